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
    disk. `tick` is told of the tokens that passed a layer.
    """

    def __init__(
        self,
        reference: StreamedModel,
        samples: Sequence[ReasoningTokens],
        how: VerifyOptions,
        folder: Path,
    ) -> None:
        """reference: after all of its layers; folder: removed by `close`, or at the end."""
        self._reference, self._samples, self._how = reference, samples, how
        self._folder = folder
        # closed at exit too: it may live as long as the process
        self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    @classmethod
    def of(
        cls,
        reference: Checkpoint,
        samples: Sequence[ReasoningTokens],
        how: VerifyOptions,
        tick: Tick = _unwatched,
    ) -> DivergenceMeter:
        """Run the reference on the samples.

        Raises:
            RainError: there are no samples, or the model cannot be run.
        """
        if not samples:
            raise RainError("no samples to compare the models on")
        folder = Path(tempfile.mkdtemp(prefix="rain-divergence-"))
        try:
            return cls(
                _ran(reference, samples, how, folder / "reference", tick), samples, how, folder
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def drift(self, model: Checkpoint, tick: Tick = _unwatched) -> Drift:
        """The mean divergence of that model by place."""
        tally = Tally()
        for sample, apart in zip(self._samples, self.divergences(model, tick), strict=True):
            tally.add(sample, apart)
        return tally.drift()

    def divergences(self, model: Checkpoint, tick: Tick = _unwatched) -> Iterator[Tensor]:
        """KL(reference || model) of the next token, in nats, at each position; text by text."""
        check_same_tokens(self._reference.layerwise.checkpoint, model)
        place = self._folder / "model"
        with closing(_ran(model, self._samples, self._how, place, tick)) as side:
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


def _ran(
    checkpoint: Checkpoint,
    samples: Sequence[ReasoningTokens],
    how: VerifyOptions,
    place: Path,
    tick: Tick,
) -> StreamedModel:
    """The model after all of its layers; hidden states beyond half of the budget go to `place`."""
    side = StreamedModel.of(checkpoint, how)
    side.embed(samples, how.budget // 2, place)
    try:
        side.run(tick)
    except BaseException:
        side.close()
        raise
    return side
