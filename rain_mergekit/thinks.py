"""Does the reasoning model think on its calibration set? The likelihood of the markers tells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rain_mergekit.capture import Shell, run_layer
from rain_mergekit.checkpoint import Checkpoint
from rain_mergekit.data import ReasoningTokens
from rain_mergekit.decoders import text_config
from rain_mergekit.distributed import World
from rain_mergekit.head import block_rows, finishing
from rain_mergekit.models import Trio

# Mean probabilities below these are no thinking. Of the testbed's models whose template leaves the
# opening to them, reasoning models have 1.0, pretrained ones up to 0.48, instruct ones 1e-4. Inside
# an open block nearly anybody closes it: the close marker tells other markers, hardly other models.
OPEN_LIMIT, CLOSE_LIMIT = 0.7, 0.01
_FEW = 4


@dataclass(frozen=True)
class Likelihood:
    """Mean probability of each marker's first token, where the calibration set has it.

    `open` is None where the chat template opens the block and leaves the model no choice.
    """

    open: float | None
    close: float

    @property
    def thinks(self) -> bool:
        """Whether a model with these probabilities writes thinking blocks of its own accord."""
        return self.close >= CLOSE_LIMIT and (self.open is None or self.open >= OPEN_LIMIT)

    def rounded(self) -> dict[str, float | None]:
        """Both to four digits: what a file records must not hang on the last bit of a sum."""
        return {"open": _round(self.open), "close": _round(self.close)}

    def __str__(self) -> str:
        opening = "" if self.open is None else f"opens the block with probability {self.open:.2g}, "
        return f"{opening}closes it with probability {self.close:.2g}"


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def likelihood(
    shell: Shell, samples: Sequence[ReasoningTokens], states: Iterable[Tensor], world: World
) -> Likelihood:
    """From the hidden states (T, d) with which each sample left the last layer.

    Over the samples of all processes.
    """
    rows: list[Tensor] = []
    targets: list[tuple[bool, int]] = []
    for sample, hidden in zip(samples, states, strict=True):
        for start in (*sample.open_starts, *sample.close_starts):
            if start:  # the first token of all is predicted by nothing
                rows.append(hidden[start - 1].cpu())
                targets.append((start in sample.open_starts, sample.input_ids[start]))
    totals = torch.zeros(2, 2, dtype=torch.float64)
    for (opens, _), p in zip(targets, _probabilities(shell, rows, targets), strict=True):
        totals[int(opens)] += torch.tensor([p, 1.0], dtype=torch.float64)
    close, opened = world.sum(totals).tolist()
    mean = opened[0] / opened[1] if opened[1] else None
    return Likelihood(open=mean, close=close[0] / max(close[1], 1.0))


def _probabilities(
    shell: Shell, rows: Sequence[Tensor], targets: Sequence[tuple[bool, int]]
) -> list[float]:
    if not rows:
        return []
    size = block_rows(int(text_config(shell.model.config).vocab_size))
    wanted = torch.tensor([token for _, token in targets])
    found: list[float] = []
    with finishing(shell) as logits:
        for part, tokens in zip(
            torch.split(torch.stack(list(rows)), size), torch.split(wanted, size), strict=True
        ):
            logs = logits(part).float().cpu().log_softmax(-1)
            found += logs.gather(1, tokens[:, None])[:, 0].exp().tolist()
    return found


def likelihood_of(
    checkpoint: Checkpoint, trio: Trio, shell: Shell, samples: Sequence[ReasoningTokens]
) -> Likelihood:
    """The same of another model of the trio, on the few shortest samples; a pass of its own."""
    few = sorted(samples, key=lambda sample: len(sample.input_ids))[:_FEW]
    other = Shell(checkpoint, trio.config, shell.dtype, str(shell.device))
    recorded = list(other.record([sample.input_ids for sample in few]))
    states = [hidden for hidden, _ in recorded]
    for index in range(len(other.layers)):
        with other.layer(index) as layer:
            for number, (_, calls) in enumerate(recorded):
                states[number] = run_layer(layer, states[number], calls[index])
    return likelihood(other, few, states, World(shell.device))
