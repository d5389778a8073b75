"""Several models against one: their divergence from it on the same texts."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType

from torch import Tensor

from rain_mergekit.errors import RainError
from rain_mergekit.evaluation.comparable import check_same_tokens
from rain_mergekit.evaluation.divergence import Drift, Tally
from rain_mergekit.evaluation.layerwise_drift import StreamedModel, Tick, VerifyOptions, divergences
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.text.token_positions import ReasoningTokens


def _unwatched(_tokens: int) -> None:
    pass


class DivergenceMeter:
    """Measures models against a reference, which runs once; no whole model is ever in memory.

    The reference's hidden states stay until `close`: half of the budget in memory, the rest on
    disk. `tick` is told of the tokens that passed a layer. Raises RainError without samples.
    """

    def __init__(
        self,
        reference: Checkpoint,
        samples: Sequence[ReasoningTokens],
        how: VerifyOptions,
        tick: Tick = _unwatched,
    ) -> None:
        if not samples:
            raise RainError("no samples to compare the models on")
        self._checkpoint, self._samples, self._how = reference, samples, how
        self._folder = tempfile.mkdtemp(prefix="rain-divergence-")
        # closed at exit too: it may live as long as the process
        self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        try:
            self._reference = self._ran(reference, "reference", tick)
        except BaseException:
            self._remove()
            raise

    def drift(self, model: Checkpoint, tick: Tick = _unwatched) -> Drift:
        """The mean divergence of that model by place."""
        tally = Tally()
        for sample, apart in zip(self._samples, self.divergences(model, tick), strict=True):
            tally.add(sample, apart)
        return tally.drift()

    def divergences(self, model: Checkpoint, tick: Tick = _unwatched) -> Iterator[Tensor]:
        """KL(reference || model) of the next token, in nats, at each position; text by text."""
        check_same_tokens(self._checkpoint, model)
        with closing(self._ran(model, "model", tick)) as side:
            yield from divergences(self._reference, side, len(self._samples))

    def close(self) -> None:
        """Free the reference's hidden states."""
        self._reference.close()
        self._remove()

    def __enter__(self) -> DivergenceMeter:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ran(self, checkpoint: Checkpoint, name: str, tick: Tick) -> StreamedModel:
        """The model after running all of its layers."""
        side = StreamedModel.of(checkpoint, self._how)
        side.embed(self._samples, self._how.budget // 2, Path(self._folder, name))
        try:
            side.run(tick)
        except BaseException:
            side.close()
            raise
        return side
