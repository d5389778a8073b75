"""Models side by side, one layer of each in memory: drift of features, and of next tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from rain_mergekit.capture.input_sites import SiteMap, capture_inputs
from rain_mergekit.capture.layer_calls import run_layer
from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.capture.next_tokens import diverging
from rain_mergekit.capture.streams import REASONING, StreamPlan, build_streams
from rain_mergekit.evaluation.divergence import Drift, Tally
from rain_mergekit.evaluation.marker_distance import MarkerDistanceProfile, MarkerDistanceTally
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.loading import LoadOptions, default_dtype, read_model_config
from rain_mergekit.text.token_positions import ReasoningTokens

Edit = Callable[[nn.Module, str], None]
Tick = Callable[[int], object]


@dataclass(frozen=True)
class VerifyOptions:
    """How the layers are run; budget: bytes of hidden states in memory, for all models together."""

    load: LoadOptions
    device: str = "cpu"
    dtype: torch.dtype | None = None
    budget: int = 2 * 1024**3


@dataclass
class SiteDrift:
    """Energies (sums of squares) at think positions, of one input site of one layer.

    reference: of the reasoning model's features; drift: of what the merged model's differ from
    them; rounding: of what the merged model's differ from those before its weights were rounded,
    None where that was not measured.
    """

    reference: float = 0.0
    drift: float = 0.0
    rounding: float | None = None

    @property
    def relative(self) -> float:
        """||H* - H_R|| / ||H_R|| (Frobenius)."""
        return (self.drift / self.reference) ** 0.5 if self.reference else 0.0

    @property
    def rounding_share(self) -> float | None:
        """The share of the drift's energy that rounding makes up; None without a drift."""
        return None if self.rounding is None or not self.drift else self.rounding / self.drift


LayerDrift = dict[str, SiteDrift]


class StreamedModel:
    """One model and its hidden states; `edit` changes each layer's weights once it is filled."""

    def __init__(self, layerwise: LayerwiseModel, edit: Edit | None = None) -> None:
        self.layerwise, self._edit = layerwise, edit

    @classmethod
    def of(cls, checkpoint: Checkpoint, how: VerifyOptions) -> StreamedModel:
        """The model of a checkpoint; default type: float32 on the CPU, else its own."""
        config = read_model_config(checkpoint)
        dtype = how.dtype or default_dtype(config, how.device)
        return cls(LayerwiseModel.open(checkpoint, config, dtype, how.device))

    def embed(self, samples: Sequence[ReasoningTokens], budget: int, folder: Path) -> None:
        """Embed the samples; `budget` bytes of hidden states stay in memory, the rest on disk."""
        plan = StreamPlan(REASONING, samples, [{}] * len(samples))
        streams = build_streams(self.layerwise, [plan], budget, folder, keep_on_device=False)
        self._stream = streams[REASONING]

    def run(self, tick: Tick) -> None:
        """All samples through all layers; `tick` is told of the tokens that passed a layer."""
        stream = self._stream
        for index in range(len(self.layerwise.layers)):
            with ExitStack() as stack:
                self.fill(index, stack)
                for number, sample in enumerate(stream.samples):
                    hidden = stream.store.get(number).to(self.layerwise.device)
                    call = stream.calls[number][index]
                    stream.store.put(number, run_layer(self._layer, hidden, call))
                    tick(len(sample.input_ids))

    def fill(self, index: int, stack: ExitStack) -> None:
        """Load layer `index` until the stack is left."""
        self._layer = stack.enter_context(self.layerwise.layer(index))
        self._index, self._sites = index, SiteMap()
        if self._edit is not None:
            self._edit(self._layer, f"{self.layerwise.prefix}.{index}")

    def advance(self, sample: int, positions: Tensor) -> dict[str, Tensor]:
        """Run one sample through the layer: its features (n, d) at the positions, by site."""
        rows: dict[str, Tensor] = {}

        def pick(site: str, inputs: Tensor, tokens: Tensor | None) -> None:
            if tokens is None:  # experts' rows differ by routing
                rows[site] = inputs[positions].float()

        store, call = self._stream.store, self._stream.calls[sample][self._index]
        hidden = store.get(sample).to(self.layerwise.device)
        with capture_inputs(self._layer, self._sites, pick, partial(len, hidden)):
            store.put(sample, run_layer(self._layer, hidden, call))
        return rows

    def final(self, sample: int) -> Tensor:
        """The hidden states (T, d) of one sample as they are now."""
        return self._stream.store.get(sample).to(self.layerwise.device)

    def close(self) -> None:
        """Free the hidden states."""
        self._stream.store.close()


def feature_drift(
    sides: Sequence[StreamedModel], samples: Sequence[ReasoningTokens], tick: Tick
) -> Iterator[LayerDrift]:
    """Layer by layer, the drift of the features at think positions, by input site.

    sides: the reasoning model, the merged one, and the merged one before rounding, if known. They
    must have been embedded, and are at the end of their layers afterwards.
    """
    layerwise = sides[0].layerwise
    for index in range(len(layerwise.layers)):
        with ExitStack() as stack:
            for side in sides:
                side.fill(index, stack)
            found: LayerDrift = {}
            for number, sample in enumerate(samples):
                positions = torch.tensor(sample.think_positions, device=layerwise.device)
                _add(found, [side.advance(number, positions) for side in sides])
                tick(len(sample.input_ids))
        yield found


def _add(found: LayerDrift, rows: Sequence[dict[str, Tensor]]) -> None:
    for site, wanted in rows[0].items():
        total, merged = found.setdefault(site, SiteDrift()), rows[1][site]
        total.reference += _energy(wanted)
        total.drift += _energy(merged - wanted.to(merged.device))
        if len(rows) > 2:
            total.rounding = (total.rounding or 0.0) + _energy(merged - rows[2][site])


def token_drift(
    reference: StreamedModel, model: StreamedModel, samples: Sequence[ReasoningTokens]
) -> tuple[Drift, MarkerDistanceProfile]:
    """Divergence by place, and by distance from the markers, of models that ran all layers."""
    tally, distances = Tally(), MarkerDistanceTally()
    for sample, apart in zip(samples, divergences(reference, model, len(samples)), strict=True):
        tally.add(sample, apart)
        distances.add(sample, apart)
    return tally.drift(), distances.around()


def divergences(reference: StreamedModel, model: StreamedModel, samples: int) -> Iterator[Tensor]:
    """KL(reference || model) of the next token, in nats: for each sample (T,) float64 on the CPU.

    The distribution at position t is that of token t + 1, over the tokens that both models have.
    Logits of a whole text never exist. Both models must have run all layers.
    """
    with diverging(reference.layerwise, model.layerwise) as divergence:
        for number in range(samples):
            yield divergence(reference.final(number), model.final(number))


def _energy(rows: Tensor) -> float:
    return float(rows.double().square().sum())
