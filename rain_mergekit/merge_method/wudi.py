"""`merge_method: wudi`: the closed form of WUDI-Merging's loss (2503.08099), for linear maps.

The rows of a task vector stand for the inputs of its map. The minimum of
Σ_i ‖(τ - τ_i) τ_iᵀ‖² / ‖τ_i‖² is τ = (Σ τ_i G_i)(Σ G_i)⁺ with G_i = τ_iᵀ τ_i / ‖τ_i‖².
The published code takes 300 steps of Adam from Σ τ_i on the same loss instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from rain_mergekit.merge_method.companion import CompanionMerge, TaskVectors, by_task_vectors
from rain_mergekit.merge_method.parameters import number, shared
from rain_mergekit.merge_method.spec import Card

CARD = Card("wudi", "WUDI-Merging, closed form", "https://arxiv.org/abs/2503.08099")
TOLERANCE = 1e-6  # eigenvalues of Σ G_i below this share of the largest count as zero
_DTYPE = torch.float64


def wudi_delta(vectors: TaskVectors, parameters: Mapping[str, Any]) -> Tensor:
    """What is added to W_B: λ τ; for tensors that are no linear map, λ times the sum."""
    total = vectors.merged(least_interference) if vectors.linear else vectors.sum()
    return total.mul_(parameters["lambda"])


def least_interference(deltas: Sequence[Tensor]) -> Tensor:
    """τ (d_out, d_in), zero outside of the range of Σ G_i; through the smaller of two systems."""
    norms = [float(torch.linalg.vector_norm(delta, dtype=_DTYPE)) for delta in deltas]
    units = [
        (norm, delta.to(_DTYPE) / norm) for norm, delta in zip(norms, deltas, strict=True) if norm
    ]
    if not units:
        return torch.zeros_like(deltas[0])
    rows, width = deltas[0].shape
    solve = _by_outputs if len(units) * rows < width else _by_inputs
    return solve(units).to(deltas[0].dtype)


def _by_inputs(units: Sequence[tuple[float, Tensor]]) -> Tensor:
    """(Σ n_i A_i G_i)(Σ G_i)⁺ with A_i = τ_i / n_i and G_i = A_iᵀ A_i (d_in, d_in)."""
    grams = [unit.mT @ unit for _, unit in units]
    inverse = _inverse(reduce(torch.add, grams))
    result = torch.zeros_like(units[0][1])
    for (norm, unit), gram in zip(units, grams, strict=True):
        result.addmm_(unit, gram @ inverse, alpha=norm)
    return result


def _by_outputs(units: Sequence[tuple[float, Tensor]]) -> Tensor:
    """The same by A (Aᵀ A)⁺ = (A Aᵀ)⁺ A: R (A Aᵀ)⁺ A, A the A_i stacked, R = [n_i A_i A_iᵀ]."""
    stacked = torch.cat([unit for _, unit in units])
    right = torch.cat([(unit @ unit.mT).mul_(norm) for norm, unit in units], 1)
    return right @ _inverse(stacked @ stacked.mT) @ stacked


def _inverse(system: Tensor) -> Tensor:
    """The pseudoinverse of a symmetric matrix with no eigenvalue below zero."""
    values, vectors = torch.linalg.eigh(system)
    kept = values > TOLERANCE * values[-1]
    vectors = vectors[:, kept]
    inverse: Tensor = (vectors / values[kept]) @ vectors.mT
    return inverse


METHOD = CompanionMerge.of(
    CARD, by_task_vectors(wudi_delta), (shared("lambda", 0.6, number("lambda")),)
)
