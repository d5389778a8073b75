"""Ridge regression of one weight from sums: the ways to solve it, and the best low-rank change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rain_mergekit.errors import RainError


@dataclass(frozen=True)
class LowRankChange:
    """A change D = A Bᵀ of one weight: a (d_out, r), b (d_in, r), float64.

    explained: the share of the full-rank ridge solution's fitted energy that the r directions keep.
    fitted: the share of the target's energy Σ w ‖e‖² that D removes, ridge penalty included.
    wanted: the rank that the rule asked for, before the upper bound.
    epsilon: the ridge penalty, relative to the mean energy of an input feature.
    """

    a: Tensor
    b: Tensor
    explained: float
    fitted: float
    wanted: int
    epsilon: float

    @property
    def rank(self) -> int:
        """Number of directions."""
        return int(self.a.shape[1])

    @property
    def matrix(self) -> Tensor:
        """A Bᵀ (d_out, d_in)."""
        return self.a @ self.b.mT


class Root(Protocol):
    """A square root F of G + g I = F Fᵀ."""

    def below(self, right: Tensor) -> Tensor:
        """F⁻¹ right."""

    def above(self, right: Tensor) -> Tensor:
        """F⁻ᵀ right."""


@dataclass(frozen=True)
class Spectrum:
    """G = V diag(values) Vᵀ (m, m), from which every penalty is solved at the same price.

    energy: the mean energy of a feature, which penalties are relative to.
    """

    values: Tensor
    vectors: Tensor
    energy: float

    @classmethod
    def of(cls, gram: Tensor, energy: float) -> Spectrum:
        """RainError where the inputs are all zero, NaN or infinite."""
        require_energy(gram)
        values, vectors = torch.linalg.eigh(gram)
        return cls(values.clamp(min=0.0), vectors, energy)

    def inverse(self, epsilon: float) -> Tensor:
        """The eigenvalues (m) of (G + g I)⁻¹, g = ε times the mean energy of a feature."""
        return 1.0 / (self.values + epsilon * self.energy)

    def root(self, epsilon: float) -> SpectralRoot:
        """F = V diag(values + g)^½."""
        return SpectralRoot(self.vectors, self.inverse(epsilon).sqrt())


@dataclass(frozen=True)
class SpectralRoot:
    """F = V diag(1 / scales), as a Root."""

    vectors: Tensor
    scales: Tensor

    def below(self, right: Tensor) -> Tensor:
        """F⁻¹ right."""
        turned: Tensor = self.vectors.mT @ right
        return self.scales[:, None] * turned

    def above(self, right: Tensor) -> Tensor:
        """F⁻ᵀ right."""
        scaled: Tensor = self.scales[:, None] * right
        return self.vectors @ scaled


@dataclass(frozen=True)
class RidgeSolver:
    """argmin_D Σ w ‖e - D x‖² + g ‖D‖² from a square root of G + g I; ε is what g was made of."""

    root: Root
    epsilon: float

    def change(self, cross: Tensor, energy: float, max_rank: int, share: float) -> LowRankChange:
        """The best change of rank r in the metric of G + g I (reduced-rank regression).

        cross: C (d_out, d). share: r is the smallest rank that keeps this share of the full
        solution's fitted energy tr(C (G + g I)⁻¹ Cᵀ), within max_rank.
        """
        # K = F⁻¹ Cᵀ (d, d_out), so C (G + g I)⁻¹ Cᵀ = Kᵀ K; the smaller side is decomposed.
        half = self.root.below(cross.mT)
        narrow = cross.shape[0] <= cross.shape[1]
        product = half.mT @ half if narrow else half @ half.mT
        values, vectors = leading(product)
        wanted = rank_for(values, share)
        kept = vectors[:, : min(wanted, max_rank)]
        if narrow:  # A = U, B = (G + g I)⁻¹ Cᵀ U = F⁻ᵀ K U
            a, inner = kept, half @ kept
        else:  # A = Kᵀ V, B = F⁻ᵀ V
            a, inner = half.mT @ kept, kept
        b = self.root.above(inner)
        return low_rank_change(a, b, values, (wanted, energy, self.epsilon))


@dataclass(frozen=True)
class CholeskyRoot:
    """The Cholesky factor L of G + g I, as a Root."""

    lower: Tensor

    @classmethod
    def of(cls, gram: Tensor, epsilon: float, energy: float) -> CholeskyRoot:
        """With g = ε times the energy of a feature, for G (m, m), positive semidefinite.

        Raises:
            RainError: G is zero, NaN or infinite, or g is too small for its rounding errors.
        """
        require_energy(gram)
        system = gram.clone()
        system.diagonal().add_(epsilon * energy)
        lower, failed = torch.linalg.cholesky_ex(system)
        if bool(failed):
            raise RainError(
                f"stream_epsilon = {epsilon:g} is lost in rounding, so the regression cannot be "
                "solved; use a larger `stream_epsilon`, or auto"
            )
        return cls(lower)

    def below(self, right: Tensor) -> Tensor:
        """L⁻¹ right."""
        found: Tensor = torch.linalg.solve_triangular(self.lower, right, upper=False)
        return found

    def above(self, right: Tensor) -> Tensor:
        """L⁻ᵀ right."""
        found: Tensor = torch.linalg.solve_triangular(self.lower.mT, right, upper=True)
        return found


def require_energy(gram: Tensor) -> float:
    """tr(G); RainError if it is zero or not finite."""
    trace = float(gram.trace())
    if not 0.0 < trace < float("inf"):
        raise RainError("its inputs are all zero, NaN or infinite on the calibration texts")
    return trace


def leading(product: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (none below zero) and eigenvectors, the largest first."""
    values, vectors = torch.linalg.eigh((product + product.mT) / 2)
    return values.flip(0).clamp(min=0.0), vectors.flip(1)


def low_rank_change(
    a: Tensor, b: Tensor, values: Tensor, found: tuple[int, float, float]
) -> LowRankChange:
    """A change of the leading directions; found: the rank wanted, the energy of the errors, ε."""
    wanted, energy, epsilon = found
    a, b = _balanced(a, b)
    total, fitted = float(values.sum()), float(values[: a.shape[1]].sum())
    return LowRankChange(
        a=a,
        b=b,
        explained=fitted / total if total > 0 else 1.0,
        fitted=fitted / energy if energy > 0 else 0.0,
        wanted=wanted,
        epsilon=epsilon,
    )


def rank_for(values: Tensor, share: float) -> int:
    """Smallest number of leading values that sum to `share` of all."""
    total = float(values.sum())
    if total <= 0.0:
        return 0
    if share >= 1.0:
        return int((values > values[0] * values.numel() * torch.finfo(values.dtype).eps).sum())
    return int((values.cumsum(0) < share * total).sum()) + 1


def _balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with columns of equal norms in both, so that neither leaves its type."""
    left, right = a.norm(dim=0), b.norm(dim=0)
    scale = (right / left.clamp(min=1e-300)).sqrt()
    scale = torch.where((scale > 0) & scale.isfinite(), scale, torch.ones_like(scale))
    return a * scale, b / scale
