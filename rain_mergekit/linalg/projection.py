"""Pure linear algebra: feature rows -> spectrum -> rank -> factors U, V of the projection.

Every function takes and returns tensors; statistics and solves are float64, because the rank
decisions live in singular values far below the largest one (float32 Gram matrices lose them).
Equation numbers are those of the RAIN-Merging paper (arXiv 2602.22538).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rain_mergekit.errors import RainError
from rain_mergekit.linalg.factors import Factors
from rain_mergekit.linalg.feature_rows import STATISTICS_DTYPE, FeatureRows


@dataclass(frozen=True)
class Spectrum:
    """Eigen-decomposition of an uncentred second moment of feature rows, largest first.

    values: k float64, eigenvalues mu_i > 0 (squared singular values of the weighted rows).
    total: trace of the second moment, the sum over all directions, kept or not.

    Only few of the directions are needed, so they are computed on demand from the side that was
    decomposed: `_left` holds eigenvectors of X X^T (n x k) with `_rows` X of unit energy, or, where
    `_rows` is None, those of X^T X (d x k), which are the directions themselves.
    """

    values: Tensor
    total: float
    width: int
    _left: Tensor
    _rows: FeatureRows | None

    @property
    def count(self) -> int:
        """k, the number of directions."""
        return self.values.numel()

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.values.device

    @property
    def vectors(self) -> Tensor:
        """All directions u_i, d x k float64 with orthonormal columns (Eq. 4's row space of H)."""
        return self.directions(torch.arange(self.count, device=self.device))

    def directions(self, chosen: Tensor) -> Tensor:
        """The directions of those indices, d x r float64, orthonormalised in the order given."""
        columns = self._left[:, chosen]
        if self._rows is not None:
            columns = self._rows.transposed_times(columns / self._sigma[chosen])
        return orthonormal(columns)

    def responses(self, delta: Tensor) -> Tensor:
        """sigma_i Delta u_i for every direction, d_out x k float32, of unit-energy features."""
        left = self._left.to(delta.device, torch.float32)
        if self._rows is not None:
            return self._rows.responses(delta) @ left
        return delta.to(torch.float32) @ (left * self._sigma.to(left))

    @property
    def _sigma(self) -> Tensor:
        return (self.values / self.total).sqrt()


def rank_cutoff(values: Tensor, rows: int, width: int) -> float:
    """Eigenvalues must be strictly above this to count as non-zero (float64 Gram matrices)."""
    if values.numel() == 0:
        return 0.0
    return float(values.max()) * max(rows, width) * torch.finfo(STATISTICS_DTYPE).eps


def spectrum(rows: Tensor | FeatureRows) -> Spectrum:
    """Decompose X^T X for weighted feature rows X (n x d), through the smaller Gram side.

    Raises RainError if a row is not finite. Zero rows give an empty spectrum.
    """
    rows = FeatureRows.of(rows)
    count, width = rows.shape
    total = rows.energy()
    if not math.isfinite(total):
        raise RainError("features contain NaN or Inf")
    if total == 0.0:
        empty = torch.zeros(width, 0, dtype=STATISTICS_DTYPE, device=rows.device)
        return Spectrum(empty[0], total, width, empty, None)
    # Scaled to unit trace, so that huge or tiny features neither overflow nor underflow.
    scaled = rows.scaled(1 / math.sqrt(total))
    values, vectors = torch.linalg.eigh(scaled.outer() if count < width else scaled.gram())
    kept = (values > rank_cutoff(values, count, width)).nonzero().flatten().flip(0)
    values, vectors = values[kept], vectors[:, kept]
    return Spectrum(values * total, total, width, vectors, scaled if count < width else None)


def orthonormal(columns: Tensor) -> Tensor:
    """Re-orthonormalise nearly orthonormal columns (d x r), keeping their order and signs."""
    if columns.shape[1] == 0:
        return columns
    q, r = torch.linalg.qr(columns)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)
    result: Tensor = q * signs
    return result


def response_energies(
    of: Sequence[Spectrum | FeatureRows], deltas: Iterable[Tensor]
) -> list[Tensor]:
    """sum_k ||Delta_k x||^2 for every x, over the modules k that share the site; float64.

    of: each is a spectrum, whose x are sigma_i u_i of unit energy, or feature rows. deltas: each
    d_out x d; a matrix may also come as several blocks of its rows. They are read once.
    """
    sums = [torch.zeros(item.count, dtype=STATISTICS_DTYPE, device=item.device) for item in of]
    for delta in deltas:
        for item, total in zip(of, sums, strict=True):
            # Squared in float64: float32 squares end at 1e19 above and 1e-23 below.
            answer = item.responses(delta).to(STATISTICS_DTYPE)
            total.add_(answer.square_().sum(0).to(total.device))
    return sums


def response_energy(found: Spectrum, deltas: Iterable[Tensor]) -> Tensor:
    """e_i = mu_i * sum_k ||Delta_k u_i||^2 over the modules k that share the site; k float64.

    deltas: as `response_energies`. Directions to which no task vector responds need no protection,
    and massive activations do not swallow the whole budget.
    """
    return response_energies([found], deltas)[0] * found.total


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


def extend_basis(
    basis: Tensor,
    rows: Tensor | FeatureRows,
    total_response: float,
    task_vectors: Iterable[Tensor],
    share: float,
    max_rank: int,
) -> tuple[Tensor, bool]:
    """Extend the basis (d x r) by the fewest directions that protect a share of the rows' response.

    Args:
        basis: orthonormal columns that stay as they are.
        rows: feature rows, n x d.
        total_response: their response energy sum_k ||Delta_k h||^2.
        task_vectors: the Delta_k, each d_out x d; read once.
        share: afterwards the rows' part outside of the basis has at most (1 - share) of the
            response energy, unless that takes more than `max_rank` directions.
        max_rank: the largest number of columns of the result.

    Returns:
        The basis, and whether `max_rank` left out directions that the share asks for.
    """
    outside = FeatureRows.of(rows).dense()
    basis = basis.to(outside)
    outside.addmm_(outside @ basis, basis.mT, alpha=-1)  # in place: it may be large
    found = spectrum(outside)
    energies = response_energy(found, task_vectors)
    order = energies.argsort(descending=True, stable=True)
    left = energies.sum() - energies[order].cumsum(0)
    allowed = (1 - share) * total_response
    wanted = 0 if float(energies.sum()) <= allowed else int((left > allowed).sum()) + 1
    more = order[: max(0, min(wanted, max_rank - basis.shape[1]))]
    return orthonormal(torch.cat([basis, found.directions(more)], 1)), len(more) < wanted


def orthogonal_factors(basis: Tensor) -> Factors:
    """Eq. 4's projector for a linear module: I - U U^T."""
    return Factors(basis, basis)


def oblique_factors(
    basis: Tensor, instruction_rows: Tensor | FeatureRows, epsilon: float
) -> Factors:
    """The least-change projection: V = M U (U^T M U)^-1, M = (C_I + gamma I)^-1.

    basis: d x r orthonormal; instruction_rows: m x d with C_I = rows^T rows (already weighted);
    gamma = epsilon * tr(C_I) / d. Among all Delta' with Delta' U = 0 it changes least what Delta
    does to the instruction features. Equals the orthogonal projection when C_I is zero.
    """
    rows = FeatureRows.of(instruction_rows)
    basis = basis.to(STATISTICS_DTYPE)
    trace = rows.energy()
    if not math.isfinite(trace):
        raise RainError("instruction features contain NaN or Inf")
    if trace == 0.0 or basis.shape[1] == 0:
        return orthogonal_factors(basis)
    gamma = epsilon * trace / rows.shape[1]
    try:
        weighted = regularised_solve(rows, basis, gamma)
        v = torch.linalg.solve(basis.T @ weighted, weighted.T).T
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise RainError(
            f"epsilon = {epsilon:g} is lost in rounding, so C_I + gamma I cannot be inverted; "
            "use a larger `epsilon` (0.1 is the default)"
        ) from None
    return Factors(basis, v)


def regularised_solve(rows: FeatureRows, right: Tensor, gamma: float) -> Tensor:
    """gamma * (rows^T rows + gamma I)^-1 right, through the smaller side (Woodbury)."""
    count, width = rows.shape
    if count >= width:
        system = rows.gram()
        system.diagonal().add_(gamma)
        return torch.cholesky_solve(right * gamma, torch.linalg.cholesky(system))
    system = rows.outer()
    system.diagonal().add_(gamma)
    inner = torch.cholesky_solve(rows.times(right), torch.linalg.cholesky(system))
    return right - rows.transposed_times(inner)


def soften(factors: Factors, weights: Tensor) -> Factors:
    """Graduated protection: V <- V D, with one weight in [0, 1] per kept direction (r)."""
    return Factors(factors.u, factors.v * weights.to(factors.v))


def ridge_weights(values: Tensor, ridge: float) -> Tensor:
    """D = s^2 / (s^2 + ridge * s_1^2) for eigenvalues s^2 of the kept directions."""
    if values.numel() == 0:
        return values
    return values / (values + ridge * values.max())
