"""Instruction-attention statistics of one sample, from the attention that a layer computes."""

from __future__ import annotations

import torch
from torch import Tensor

from rain_mergekit.linalg.coefficients import span_masses
from rain_mergekit.models import attention
from rain_mergekit.models.attention import AttentionCall, Heads
from rain_mergekit.text.token_positions import InstructionTokens


class AttentionStatistics:
    """Observer of attention calls: alignment and leakage (n_heads each) of one sample.

    Only the rows of related and unrelated response tokens are computed, in blocks.
    """

    def __init__(self, sample: InstructionTokens, *, leakage_from_thinking: bool) -> None:
        self._sample = sample
        extra = sample.thinking_positions if leakage_from_thinking else ()
        self._related = [span.related for span in sample.spans]
        self._unrelated = [tuple(sorted({*span.unrelated, *extra})) for span in sample.spans]
        self.alignment: Tensor | None = None
        self.leakage: Tensor | None = None
        self.call: Heads | None = None

    def __call__(self, call: AttentionCall) -> None:
        """Measure one attention computation."""
        self.call = call.heads
        wanted = sorted({row for rows in self._related + self._unrelated for row in rows})
        masses = self._masses(call, wanted)
        place = {row: index for index, row in enumerate(wanted)}
        self.alignment = _mean_over_spans(masses, self._related, place)
        self.leakage = _mean_over_spans(masses, self._unrelated, place)

    def _masses(self, call: AttentionCall, wanted: list[int]) -> Tensor:
        """Attention mass on each instruction: heads x len(wanted) x spans, float64."""
        length, heads = call.key.shape[2], call.query.shape[1]
        device = call.query.device
        masks = torch.zeros(length, len(self._sample.spans), device=device)
        for column, span in enumerate(self._sample.spans):
            masks[list(span.prompt), column] = 1.0
        step = max(1, attention.BLOCK_BYTES // (heads * length * 4))
        index = torch.tensor(wanted, device=device)
        parts = [span_masses(call.rows(part), masks) for part in torch.split(index, step)]
        return torch.cat(parts, 1).to("cpu", torch.float64)


def _mean_over_spans(
    masses: Tensor, rows_of: list[tuple[int, ...]], place: dict[int, int]
) -> Tensor:
    """Mean over each instruction's rows (0 if none), then over instructions (Eqs. 10-12)."""
    per_span = [
        masses[:, [place[row] for row in rows], column].mean(1)
        if rows
        else torch.zeros(masses.shape[0], dtype=masses.dtype)
        for column, rows in enumerate(rows_of)
    ]
    return torch.stack(per_span).mean(0)
