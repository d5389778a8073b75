"""Check that the reasoning model thinks on its set, by the likelihood of the markers.

Where the chat template opens the block there is no open marker to look at. There the thinking text
is compared with what the instruct model makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rain_mergekit.capture.layer_calls import run_layer
from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.capture.output_head import block_rows, finishing
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.empty_model import text_config
from rain_mergekit.models.loading import read_model_config
from rain_mergekit.system.distributed import World
from rain_mergekit.text.token_positions import InstructionTokens, ReasoningTokens

# With mean probabilities below these a model does not think. Where the template leaves the opening
# to the model, the testbed's reasoning models have 1.0, pretrained ones up to 0.48, instruct ones
# 1e-4. Nearly every model closes an open block, so the probability of the close marker detects
# wrong markers, not wrong models.
OPEN_LIMIT, CLOSE_LIMIT = 0.7, 0.01
# Log-likelihood a token that the thinking text may have more under the instruct model. The
# testbed's reasoning models are 0.07 or more above their instruct models, on a few samples; real
# ones that both think may be level.
LEVEL = 0.02
# How many short samples the other models are compared on, and tokens of each.
COMPARED, _TOKENS = 4, 64
Tokens = TypeVar("Tokens", ReasoningTokens, InstructionTokens)
_KINDS = ("close", "open", "thinking")
_CLOSE, _OPEN, _THINKING = range(3)


@dataclass(frozen=True)
class Likelihood:
    """Mean probability of each marker's first token, where the calibration set has it.

    `open` is None where the chat template opens the block and leaves the model no choice. Only
    there, `thinking` is the mean log-likelihood (nats a token) of the text in the block, to the
    close marker's first token, on a few short samples.
    """

    open: float | None
    close: float
    thinking: float | None = None

    @property
    def thinks(self) -> bool:
        """Whether a model with these probabilities writes thinking blocks of its own accord."""
        return self.close >= CLOSE_LIMIT and (self.open is None or self.open >= OPEN_LIMIT)

    def outdone_by(self, other: Likelihood) -> bool:
        """Whether the other model finds the set's thinking clearly more likely."""
        if self.thinking is None or other.thinking is None:
            return False
        return other.thinking > self.thinking + LEVEL

    def rounded(self) -> dict[str, float | None]:
        """Rounded to four digits: a file must not depend on the last bit of a sum."""
        return {name: _round(value) for name, value in asdict(self).items()}

    def __str__(self) -> str:
        opening = "" if self.open is None else f"opens the block with probability {self.open:.2g}, "
        text = "" if self.thinking is None else f", writes {self.thinking:.2g} nats a token in it"
        return f"{opening}closes it with probability {self.close:.2g}{text}"


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def likelihood(
    layerwise: LayerwiseModel,
    samples: Sequence[ReasoningTokens],
    states: Iterable[Tensor],
    world: World,
    few: Sequence[ReasoningTokens] = (),
) -> Likelihood:
    """The likelihoods by the hidden states (T, d) with which each sample left the last layer.

    Over the samples of all processes; the thinking text over those of them that are in `few`.
    Samples behind a turn of another one count only where no other sample tells a likelihood: a
    model may think on its set, and not later in a chat.
    """
    rows: list[Tensor] = []
    targets: list[tuple[int, int, int]] = []
    for sample, hidden in zip(samples, states, strict=True):
        places = _places(sample, thinking=sample in few)
        rows += [hidden[place - 1].cpu() for _, place in places]
        lent = int(bool(sample.lent_positions))
        targets += [(lent, kind, sample.input_ids[place]) for kind, place in places]
    totals = torch.zeros(2, len(_KINDS), 2, dtype=torch.float64)
    logs = log_likelihoods(layerwise, rows, [token for _, _, token in targets])
    for (lent, kind, _), log in zip(targets, logs, strict=True):
        value = log if kind == _THINKING else math.exp(log)
        totals[lent, kind] += torch.tensor([value, 1.0], dtype=torch.float64)
    alone, behind = world.sum(totals).tolist()
    pairs = [one if one[1] else other for one, other in zip(alone, behind, strict=True)]
    found = {
        name: total / count if count else None
        for name, (total, count) in zip(_KINDS, pairs, strict=True)
    }
    return Likelihood(found["open"], found["close"] or 0.0, found["thinking"])


def _places(sample: ReasoningTokens, *, thinking: bool) -> list[tuple[int, int]]:
    """Which tokens to look at, as (kind, index); never the first token, which nothing predicts.

    Of a block that the template opens, evenly chosen tokens of the text and the close marker.
    """
    places = [(_OPEN, start) for start in sample.open_starts]
    places += [(_CLOSE, start) for start in sample.close_starts]
    if thinking and not sample.open_starts:
        for start, end in zip(sample.open_ends, sample.close_starts, strict=True):
            step = -(-(end + 1 - start) // _TOKENS)
            places += [(_THINKING, place) for place in range(start, end + 1, max(step, 1))]
    return [(kind, place) for kind, place in places if place]


def log_likelihoods(
    layerwise: LayerwiseModel, rows: Sequence[Tensor], tokens: Sequence[int]
) -> list[float]:
    """log p of each token, in nats, by the state (d) of the one before it after the last layer."""
    if not rows:
        return []
    size = block_rows(vocabulary(layerwise))
    wanted = torch.tensor(tokens)
    found: list[float] = []
    with finishing(layerwise) as logits:
        for part, block in zip(
            torch.split(torch.stack(list(rows)), size), torch.split(wanted, size), strict=True
        ):
            logs = logits(part).float().cpu().log_softmax(-1)
            found += logs.gather(1, block[:, None])[:, 0].tolist()
    return found


def vocabulary(layerwise: LayerwiseModel) -> int:
    """How many tokens the model's head knows."""
    return int(text_config(layerwise.model.config).vocab_size)


def shortest(samples: Iterable[Tokens]) -> list[Tokens]:
    """The few shortest samples, on which the other two models are compared."""
    return sorted(samples, key=lambda sample: len(sample.input_ids))[:COMPARED]


def likelihood_of(
    layerwise: LayerwiseModel, samples: Sequence[ReasoningTokens]
) -> Likelihood | None:
    """The likelihood of any model on the few shortest samples, by a pass of its own.

    None if its vocabulary ends before the samples' tokens do.
    """
    few = shortest(samples)
    states = last_states(layerwise, [sample.input_ids for sample in few])
    if states is None:
        return None
    return likelihood(layerwise, few, states, World(layerwise.device), few)


def beside(checkpoint: Checkpoint, layerwise: LayerwiseModel) -> LayerwiseModel:
    """Another model, with the type and the device of `layerwise`."""
    config = read_model_config(checkpoint)
    return LayerwiseModel.open(checkpoint, config, layerwise.dtype, str(layerwise.device))


def last_states(other: LayerwiseModel, texts: Sequence[Sequence[int]]) -> list[Tensor] | None:
    """The hidden states (T, d) with which each text leaves the last layer.

    None if the model's vocabulary ends before the texts' tokens do.
    """
    if max(map(max, texts)) >= vocabulary(other):
        return None
    recorded = list(other.record(texts))
    states = [hidden for hidden, _ in recorded]
    for index in range(len(other.layers)):
        with other.layer(index) as layer:
            for number, (_, calls) in enumerate(recorded):
                states[number] = run_layer(layer, states[number], calls[index])
    return states
