"""`merge_method: opcm`: later task vectors count outside of the earlier directions (2501.09522).

Per matrix, with T = U Σ Vᵀ the task vectors so far: of Uᵀ Δ V the diagonal and the leading r x r
block are set to zero, and U (..) Vᵀ is added to T. In the end T is scaled once. The published
recursion divides by a factor of its own at each model; singular vectors do not see a factor, so
the result is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rain_mergekit.linalg.feature_rows import STATISTICS_DTYPE, FeatureRows
from rain_mergekit.linalg.projection import spectrum
from rain_mergekit.merge_method.companion import CompanionMerge, TaskVectors, by_task_vectors
from rain_mergekit.merge_method.parameters import number, one_of, shared
from rain_mergekit.merge_method.spec import Card

CARD = Card("opcm", "OPCM", "https://arxiv.org/abs/2501.09522")


def opcm_delta(vectors: TaskVectors, parameters: Mapping[str, Any]) -> Tensor:
    """What is added to W_B: λ c T, with c = mean ‖Δ_i‖ / ‖T‖ for `normalize: tensor`, else 1."""
    if vectors.linear:
        total = vectors.merged(partial(sequence, alpha=parameters["alpha"]))
    else:
        total = vectors.sum()
    factor: float = parameters["lambda"]
    if parameters["normalize"] == "tensor" and (norm := _norm(total)):
        factor *= sum(_norm(delta) for delta in vectors.deltas) / len(vectors.deltas) / norm
    return total.mul_(factor)


def sequence(deltas: Sequence[Tensor], alpha: float) -> Tensor:
    """T after all task vectors (d_out, d_in), the first whole; alpha as `kept_directions`."""
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total += outside(total, delta, alpha)
    return total


def outside(total: Tensor, delta: Tensor, alpha: float) -> Tensor:
    """Δ - U B Vᵀ for T = U Σ Vᵀ: B is the diagonal of Uᵀ Δ V and its leading r x r block.

    The singular vectors come from the Gram matrix of the smaller side, in float64: with C = TᵀΔ,
    Uᵀ Δ V = Σ⁻¹ Vᵀ C V and U B Vᵀ = T (V Σ⁻¹ B Vᵀ), so U is never made. Directions in which T is
    zero are left alone.
    """
    if total.shape[0] < total.shape[1]:
        return outside(total.mT, delta.mT, alpha).mT
    found, rows = spectrum(total), FeatureRows.of(total)
    if not found.count:
        return delta
    values, right = found.values.sqrt(), found.vectors
    scaled = right / values
    inner = scaled.mT @ rows.transposed_times(delta) @ right
    r = kept_directions(values, alpha)
    removed = torch.diag(inner.diagonal())
    removed[:r, :r] = inner[:r, :r]
    return delta - rows.times(scaled @ removed @ right.mT).to(delta.dtype)


def kept_directions(values: Tensor, alpha: float) -> int:
    """r: how many leading singular values sum to at most a share alpha; from alpha = 1 on, all.

    The published code takes the 0-based index of the first cumulative share above alpha, which is
    this number, and one less than its documentation says; at alpha = 1 rounding decides there.
    """
    if alpha >= 1:
        return values.numel()
    shares = values.cumsum(0) / values.sum()
    return int((shares <= alpha).sum())


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=STATISTICS_DTYPE))


METHOD = CompanionMerge.of(
    CARD,
    by_task_vectors(opcm_delta),
    (
        shared("alpha", 0.5, number("alpha", 0.0, 1.0)),
        shared("normalize", "tensor", one_of("normalize", "tensor", "none"), str),
        shared("lambda", 1.0, number("lambda")),
    ),
)
