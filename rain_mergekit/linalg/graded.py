"""RegMean as a graded projection: G_I (G_I + s G_R)⁻¹ = I - U Vᵀ for two sets of features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rain_mergekit.errors import RainError
from rain_mergekit.linalg.factors import Factors
from rain_mergekit.linalg.feature_rows import STATISTICS_DTYPE, FeatureRows
from rain_mergekit.linalg.projection import rank_cutoff, regularised_solve


@dataclass(frozen=True)
class Graded:
    """The directions of G_R in the metric of M = G_I + g I, strongest first.

    ratios: mu_i (k) with G_R v_i = mu_i M v_i and v_iᵀ M v_j = delta_ij. left: M v_i / ‖M v_i‖,
    right: ‖M v_i‖ v_i, both (d, k), float64. scales: ‖M v_i‖ (k). strength: s. With the weights
    w_i = s mu_i / (1 + s mu_i), M (M + s G_R)⁻¹ = I - Σ w_i left_i right_iᵀ.
    """

    ratios: Tensor
    left: Tensor
    right: Tensor
    scales: Tensor
    strength: float

    @property
    def weights(self) -> Tensor:
        """w_i (k): 0 where the reasoning set has no energy, near 1 where it has nearly all."""
        strong = self.strength * self.ratios
        return strong / (1 + strong)

    def gains(self, deltas: Iterable[Tensor]) -> Tensor:
        """What each direction takes off tr(Δ' (M + s G_R) Δ'ᵀ), summed over the modules (k)."""
        energy = torch.zeros_like(self.ratios)
        for delta in deltas:
            energy += (delta @ self.left.to(delta)).to(STATISTICS_DTYPE).square_().sum(0)
        return energy * self.scales.square() * self.weights * self.strength * self.ratios

    def factors(self, chosen: Tensor) -> Factors:
        """U and V of some of the directions."""
        return Factors(self.left[:, chosen], self.right[:, chosen] * self.weights[chosen])


def graded(
    reasoning: FeatureRows, instruction: FeatureRows | None, strength: float, epsilon: float
) -> Graded:
    """Solve the generalised eigenproblem through the reasoning rows X, G_R = XᵀX.

    instruction: rows with G_I = rowsᵀ rows; None: G_I is zero. strength: s. epsilon: g relative to
    the mean diagonal element of G_I, of G_R where that is zero. RainError if g is lost in rounding.
    """
    width = reasoning.shape[1]
    rows = reasoning.dense()
    if rows.shape[0] > width:
        rows = torch.linalg.qr(rows, mode="r").R
    trace = 0.0 if instruction is None else instruction.energy()
    penalty = epsilon * (trace or reasoning.energy()) / width
    try:
        solved = _solve(instruction, rows.mT, penalty)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise RainError(
            f"regmean.epsilon = {epsilon:g} is lost in rounding, so the second moments cannot be "
            "inverted; use a larger one (1e-6 is the default)"
        ) from None
    product = rows @ solved
    values, vectors = torch.linalg.eigh((product + product.mT) / 2)
    kept = (values > rank_cutoff(values, *rows.shape)).nonzero().flatten().flip(0)
    values, vectors = values[kept], vectors[:, kept] / values[kept].sqrt()
    left, right = rows.mT @ vectors, solved @ vectors
    scales = left.norm(dim=0)
    return Graded(values, left / scales, right * scales, scales, strength)


def _solve(instruction: FeatureRows | None, right: Tensor, penalty: float) -> Tensor:
    """(G_I + g I)⁻¹ right."""
    if instruction is None or not penalty:
        return right / (penalty or 1.0)
    return regularised_solve(instruction, right, penalty) / penalty
