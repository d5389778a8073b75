"""Ridge regression for one input site: weighted sums over tokens, and the best low-rank change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rain_mergekit.errors import RainError

SUM_DTYPE = torch.float64
# Rows wait until there are so many: one large product is faster than many small ones.
_BUFFERED_ROWS = 1024


class RidgeSums:
    """Mutable: the sums of one site's regression over tokens i with weights w_i.

    gram: G = Σ w_i x_i x_iᵀ (d, d). cross: by weight, C = Σ w_i e_i x_iᵀ (d_out, d). energy: by
    weight, Σ w_i ‖e_i‖². x_i is what the merged model's module receives, e_i what its output lacks
    of the target. Products are computed in float32 at least, because a few features are far larger
    than the others and the rounding of a 16-bit product would hide these; sums are float64.
    """

    def __init__(self, width: int, outputs: Mapping[str, int], device: torch.device) -> None:
        self.gram = torch.zeros(width, width, dtype=SUM_DTYPE, device=device)
        self.cross = {
            name: torch.zeros(size, width, dtype=SUM_DTYPE, device=device)
            for name, size in outputs.items()
        }
        self.energy = dict.fromkeys(outputs, 0.0)
        self._rows: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []

    def add(self, inputs: Tensor, errors: Mapping[str, Tensor], weights: Tensor) -> None:
        """Add tokens: inputs (n, d), errors by weight (n, d_out), weights (n) above zero."""
        if inputs.shape[0] == 0:
            return
        self._rows.append((inputs, weights, dict(errors)))
        if sum(rows.shape[0] for rows, _, _ in self._rows) >= _BUFFERED_ROWS:
            self.flush()

    def flush(self) -> None:
        """Add the rows that still wait to the sums."""
        if not self._rows:
            return
        inputs = _exact(torch.cat([rows for rows, _, _ in self._rows]))
        roots = torch.cat([weights for _, weights, _ in self._rows]).sqrt().to(inputs)[:, None]
        inputs = inputs * roots
        self.gram += inputs.mT @ inputs
        for name in self.cross:
            errors = _exact(torch.cat([one[name] for _, _, one in self._rows])) * roots
            self.cross[name] += errors.mT @ inputs
            self.energy[name] += float(torch.linalg.vector_norm(errors, dtype=SUM_DTYPE)) ** 2
        self._rows.clear()

    def summed(self, total: Callable[[Tensor], Tensor]) -> RidgeSums:
        """The same sums over all processes, in place; `total` adds one tensor up over them."""
        self.flush()
        self.gram = total(self.gram)
        self.cross = {name: total(cross) for name, cross in self.cross.items()}
        energies = torch.tensor(list(self.energy.values()), dtype=SUM_DTYPE)
        self.energy = dict(zip(self.energy, total(energies).tolist(), strict=True))
        return self

    def changes(self, epsilon: float, max_rank: int, share: float) -> dict[str, LowRankChange]:
        """The change of every weight; RainError where the system cannot be solved."""
        self.flush()
        solver = RidgeSolver(self.gram, epsilon)
        return {
            name: solver.change(cross, self.energy[name], max_rank, share)
            for name, cross in self.cross.items()
        }


@dataclass(frozen=True)
class LowRankChange:
    """A change D = A Bᵀ of one weight: a (d_out, r), b (d_in, r), float64.

    explained: the share of the full-rank ridge solution's fitted energy that the r directions keep.
    fitted: the share of the target's energy Σ w ‖e‖² that D removes, ridge penalty included.
    wanted: the rank that the rule asked for, before the upper bound.
    """

    a: Tensor
    b: Tensor
    explained: float
    fitted: float
    wanted: int

    @property
    def rank(self) -> int:
        """Number of directions."""
        return int(self.a.shape[1])

    @property
    def matrix(self) -> Tensor:
        """A Bᵀ (d_out, d_in)."""
        return self.a @ self.b.mT


class RidgeSolver:
    """argmin_D Σ w ‖e - D x‖² + g ‖D‖², g = ε tr(G) / d, for every weight of one site.

    The factor of G + g I is computed once. RainError if it cannot be computed.
    """

    def __init__(self, gram: Tensor, epsilon: float) -> None:
        self.width = int(gram.shape[0])
        self._factor = _Factor(gram, epsilon, self.width).lower

    def change(self, cross: Tensor, energy: float, max_rank: int, share: float) -> LowRankChange:
        """The best change of rank r in the metric of G + g I (reduced-rank regression).

        cross: C (d_out, d). share: r is the smallest rank that keeps this share of the full
        solution's fitted energy tr(C (G + g I)⁻¹ Cᵀ), within max_rank.
        """
        # K = L⁻¹ Cᵀ (d, d_out), so C (G + g I)⁻¹ Cᵀ = Kᵀ K; the smaller side is decomposed.
        half = torch.linalg.solve_triangular(self._factor, cross.mT, upper=False)
        outputs = int(cross.shape[0])
        narrow = outputs <= self.width
        product = half.mT @ half if narrow else half @ half.mT
        values, vectors = _leading(product)
        wanted = _rank_for(values, share)
        rank = min(wanted, max_rank)
        kept = vectors[:, :rank]
        if narrow:  # A = U, B = (G + g I)⁻¹ Cᵀ U = L⁻ᵀ K U
            a, inner = kept, half @ kept
        else:  # A = Kᵀ V, B = L⁻ᵀ V
            a, inner = half.mT @ kept, kept
        b = torch.linalg.solve_triangular(self._factor.mT, inner, upper=True)
        return _change(a, b, values, rank, wanted, energy)


class RidgeRows:
    """Mutable: the rows of one site's regression, where d is too wide for sums of d x d.

    The same `add` as RidgeSums. The dual form needs only n x n for n rows.
    """

    def __init__(self, outputs: Mapping[str, int]) -> None:
        self.energy = dict.fromkeys(outputs, 0.0)
        self._inputs: list[Tensor] = []
        self._errors: dict[str, list[Tensor]] = {name: [] for name in outputs}

    def add(self, inputs: Tensor, errors: Mapping[str, Tensor], weights: Tensor) -> None:
        """Add tokens: inputs (n, d), errors by weight (n, d_out), weights (n) above zero."""
        inputs = _exact(inputs)
        roots = weights.sqrt().to(inputs)[:, None]
        self._inputs.append(inputs * roots)
        for name, rows in self._errors.items():
            rows.append(_exact(errors[name]) * roots)
            self.energy[name] += float(torch.linalg.vector_norm(rows[-1], dtype=SUM_DTYPE)) ** 2

    def changes(self, epsilon: float, max_rank: int, share: float) -> dict[str, LowRankChange]:
        """The change of every weight, as RidgeSolver.change; RainError as there.

        With X (n, d) and E (n, d_out) the weighted rows, D = Eᵀ (X Xᵀ + g I)⁻¹ X.
        """
        inputs = torch.cat(self._inputs)
        outer = inputs @ inputs.mT
        solver = _Factor(outer.to(SUM_DTYPE), epsilon, int(inputs.shape[1]))
        found: dict[str, LowRankChange] = {}
        for name, parts in self._errors.items():
            errors = torch.cat(parts).to(SUM_DTYPE)
            solved = solver.solve(errors)  # (n, d_out)
            # C (G + g I)⁻¹ Cᵀ = Eᵀ K (K + g I)⁻¹ E with K = X Xᵀ
            product = errors.mT @ (outer.to(SUM_DTYPE) @ solved)
            values, vectors = _leading(product)
            wanted = _rank_for(values, share)
            rank = min(wanted, max_rank)
            kept = vectors[:, :rank]
            b = (inputs.mT @ (solved @ kept).to(inputs)).to(SUM_DTYPE)
            found[name] = _change(kept, b, values, rank, wanted, self.energy[name])
        return found


class _Factor:
    """The Cholesky factor of M + g I with g = ε tr(M) / width."""

    def __init__(self, matrix: Tensor, epsilon: float, width: int) -> None:
        trace = float(matrix.trace())
        if not 0.0 < trace < float("inf"):
            raise RainError("its inputs are all zero, NaN or infinite on the calibration texts")
        system = matrix.clone()
        system.diagonal().add_(epsilon * trace / width)
        self.lower, failed = torch.linalg.cholesky_ex(system)
        if bool(failed):
            raise RainError(
                f"stream_epsilon = {epsilon:g} is lost in rounding, so the regression cannot be "
                "solved; use a larger `stream_epsilon` (0.01 is the default)"
            )

    def solve(self, right: Tensor) -> Tensor:
        """(M + g I)⁻¹ right."""
        return torch.cholesky_solve(right, self.lower)


def _exact(rows: Tensor) -> Tensor:
    """The rows in float32, or in float64 if they are."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _leading(product: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (none below zero) and eigenvectors, the largest first."""
    values, vectors = torch.linalg.eigh((product + product.mT) / 2)
    return values.flip(0).clamp(min=0.0), vectors.flip(1)


def _change(
    a: Tensor, b: Tensor, values: Tensor, rank: int, wanted: int, energy: float
) -> LowRankChange:
    a, b = _balanced(a, b)
    total, fitted = float(values.sum()), float(values[:rank].sum())
    return LowRankChange(
        a=a,
        b=b,
        explained=fitted / total if total > 0 else 1.0,
        fitted=fitted / energy if energy > 0 else 0.0,
        wanted=wanted,
    )


def _rank_for(values: Tensor, share: float) -> int:
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
