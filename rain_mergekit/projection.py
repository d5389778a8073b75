"""Pure linear algebra: feature rows -> spectrum -> rank -> factors U, V of the projection.

Every function takes and returns tensors; statistics and solves are float64, because the rank
decisions live in singular values far below the largest one (float32 Gram matrices lose them).
Equation numbers are those of the RAIN-Merging paper (arXiv 2602.22538).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rain_mergekit.errors import RainError

STATISTICS_DTYPE = torch.float64


@dataclass(frozen=True)
class Spectrum:
    """Eigen-decomposition of an uncentred second moment of feature rows, largest first.

    vectors: d x k float64, orthonormal columns u_i (Eq. 4's row space of H).
    values: k float64, eigenvalues mu_i > 0 (squared singular values of the weighted rows).
    total: trace of the second moment, the sum over all directions, kept or not.
    """

    vectors: Tensor
    values: Tensor
    total: float


@dataclass(frozen=True)
class Factors:
    """The projection I - U V^T; `v is u` for the orthogonal case. Both d x r."""

    u: Tensor
    v: Tensor


def rank_cutoff(values: Tensor, rows: int, width: int) -> float:
    """Eigenvalues must be strictly above this to count as non-zero (float64 Gram matrices)."""
    if values.numel() == 0:
        return 0.0
    return float(values.max()) * max(rows, width) * torch.finfo(STATISTICS_DTYPE).eps


def spectrum(rows: Tensor) -> Spectrum:
    """Decompose rows^T rows for weighted feature rows (n x d), through the smaller Gram side.

    Raises RainError if a row is not finite. Zero rows give an empty spectrum.
    """
    rows = rows.to(STATISTICS_DTYPE)
    if not bool(torch.isfinite(rows).all()):
        raise RainError("features contain NaN or Inf")
    count, width = rows.shape
    total = float(rows.square().sum())
    if count == 0 or total == 0.0:
        return Spectrum(rows.new_zeros((width, 0)), rows.new_zeros(0), total)
    # Scaled to unit trace, so that huge or tiny features neither overflow nor underflow.
    scaled = rows / math.sqrt(total)
    gram = scaled @ scaled.T if count < width else scaled.T @ scaled
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    keep = values > rank_cutoff(values, count, width)
    values, vectors = values[keep], vectors[:, keep]
    if count < width:
        vectors = orthonormal((scaled.T @ vectors) / values.sqrt())
    return Spectrum(vectors, values * total, total)


def orthonormal(columns: Tensor) -> Tensor:
    """Re-orthonormalise nearly orthonormal columns (d x r), keeping their order and signs."""
    if columns.shape[1] == 0:
        return columns
    q, r = torch.linalg.qr(columns)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)
    result: Tensor = q * signs
    return result


def response_energy(vectors: Tensor, values: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """e_i = mu_i * sum_k ||Delta_k u_i||^2 over the modules k that share the site; k float64.

    vectors: d x k, values: k, deltas: each d_out x d. Directions to which no task vector responds
    need no protection, and massive activations do not swallow the whole budget.
    """
    energy = torch.zeros_like(values)
    for delta in deltas:
        answer = delta.to(torch.float32) @ vectors.to(torch.float32)
        energy += answer.square().sum(0, dtype=torch.float64).to(energy.device)
    return energy * values


def count_for_share(energies: Tensor, share: float) -> int:
    """Smallest number of leading entries that sum to `share` (0, 1] of the total."""
    total = float(energies.sum())
    if total == 0.0:
        return 0
    reached = energies.cumsum(0) >= share * total * (1 - 1e-12)
    return int(reached.to(torch.int8).argmax()) + 1


def count_above(values: Tensor, tolerance: float) -> int:
    """Number of directions with sigma_i > tolerance * sigma_1 (strict), sigma = sqrt(value)."""
    if values.numel() == 0:
        return 0
    return int((values.sqrt() > tolerance * values.max().sqrt()).sum())


def orthogonal_factors(basis: Tensor) -> Factors:
    """Eq. 4's projector for a linear module: I - U U^T."""
    return Factors(basis, basis)


def oblique_factors(basis: Tensor, instruction_rows: Tensor, epsilon: float) -> Factors:
    """The least-change projection: V = M U (U^T M U)^-1, M = (C_I + gamma I)^-1.

    basis: d x r orthonormal; instruction_rows: m x d with C_I = rows^T rows (already weighted);
    gamma = epsilon * tr(C_I) / d. Among all Delta' with Delta' U = 0 it changes least what Delta
    does to the instruction features. Falls back to the orthogonal case when C_I is zero.
    """
    rows = instruction_rows.to(STATISTICS_DTYPE)
    basis = basis.to(STATISTICS_DTYPE)
    if not bool(torch.isfinite(rows).all()):
        raise RainError("instruction features contain NaN or Inf")
    trace = float(rows.square().sum())
    if trace == 0.0 or basis.shape[1] == 0:
        return orthogonal_factors(basis)
    gamma = epsilon * trace / rows.shape[1]
    weighted = _regularised_solve(rows, basis, gamma)
    inner = basis.T @ weighted
    v = torch.linalg.solve(inner, weighted.T).T
    return Factors(basis, v)


def _regularised_solve(rows: Tensor, right: Tensor, gamma: float) -> Tensor:
    """gamma * (rows^T rows + gamma I)^-1 right, through the smaller side (Woodbury)."""
    count, width = rows.shape
    if count >= width:
        system = rows.T @ rows
        system.diagonal().add_(gamma)
        return torch.cholesky_solve(right * gamma, torch.linalg.cholesky(system))
    system = rows @ rows.T
    system.diagonal().add_(gamma)
    inner = torch.cholesky_solve(rows @ right, torch.linalg.cholesky(system))
    return right - rows.T @ inner


def soften(factors: Factors, weights: Tensor) -> Factors:
    """Graduated protection: V <- V D, with one weight in [0, 1] per kept direction (r)."""
    return Factors(factors.u, factors.v * weights.to(factors.v))


def ridge_weights(values: Tensor, ridge: float) -> Tensor:
    """D = s^2 / (s^2 + ridge * s_1^2) for eigenvalues s^2 of the kept directions."""
    if values.numel() == 0:
        return values
    return values / (values + ridge * values.max())


def project(delta: Tensor, factors: Factors) -> Tensor:
    """Delta (I - U V^T), Eq. 8 for a linear module: zero on span(U) whatever Delta is."""
    u, v = factors.u.to(delta), factors.v.to(delta)
    return delta - (delta @ u) @ v.T
