"""Ridge regression for one input site: weighted sums over tokens, and the best low-rank change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from rain_mergekit.linalg.ridge_solver import (
    CholeskyRoot,
    LowRankChange,
    RidgeSolver,
    Root,
    Spectrum,
    require_energy,
)

SUM_DTYPE = torch.float64
EPSILON = 0.01  # where no token is held out to choose by
# What is chosen from: the error is flat around its least value, so half decades are enough.
CANDIDATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
# Rows wait until there are so many: one large product is faster than many small ones.
BUFFERED_ROWS = 1024
# Texts that were held aside are of the kinds that are fitted; others want a larger penalty.
KEPT = 0.85
# The root of G + g I, ε, and whether the change leaves less of the errors held aside than none.
Chosen: TypeAlias = "tuple[Root, float, bool]"


class TokenSums:
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
        if sum(rows.shape[0] for rows, _, _ in self._rows) >= BUFFERED_ROWS:
            self.flush()

    def flush(self) -> None:
        """Add the rows that still wait to the sums."""
        if not self._rows:
            return
        inputs = exact(torch.cat([rows for rows, _, _ in self._rows]))
        roots = torch.cat([weights for _, weights, _ in self._rows]).sqrt().to(inputs)[:, None]
        inputs = inputs * roots
        self.gram += inputs.mT @ inputs
        for name in self.cross:
            errors = exact(torch.cat([one[name] for _, _, one in self._rows])) * roots
            self.cross[name] += errors.mT @ inputs
            self.energy[name] += float(torch.linalg.vector_norm(errors, dtype=SUM_DTYPE)) ** 2
        self._rows.clear()

    def sum_over(self, total: Callable[[Tensor], Tensor]) -> None:
        """Make them the sums over all processes; `total` adds one tensor up over these."""
        self.flush()
        self.gram = total(self.gram)
        self.cross = {name: total(cross) for name, cross in self.cross.items()}
        energies = torch.tensor(list(self.energy.values()), dtype=SUM_DTYPE)
        self.energy = dict(zip(self.energy, total(energies).tolist(), strict=True))


class RidgeSums:
    """Mutable: the sums of one site, of tokens that are fitted and of tokens that are held aside.

    choose: whether there are tokens held aside, to choose ε by. features: how many the mean energy
    in the penalty is over, where they are not `width`.
    """

    def __init__(
        self,
        width: int,
        outputs: Mapping[str, int],
        device: torch.device,
        *,
        choose: bool = False,
        features: int | None = None,
    ) -> None:
        self._fitted = TokenSums(width, outputs, device)
        self._aside = TokenSums(width, outputs, device) if choose else None
        self._features = width if features is None else features

    def add(
        self,
        inputs: Tensor,
        errors: Mapping[str, Tensor],
        weights: Tensor,
        *,
        aside: bool = False,
    ) -> None:
        """Add tokens: inputs (n, d), errors by weight (n, d_out), weights (n) above zero."""
        sums = self._aside if aside and self._aside else self._fitted
        sums.add(inputs, errors, weights)

    def sum_over(self, total: Callable[[Tensor], Tensor]) -> None:
        """Make them the sums over all processes; `total` adds one tensor up over these."""
        for sums in (self._fitted, self._aside):
            if sums is not None:
                sums.sum_over(total)

    def changes(
        self,
        epsilon: float | None,
        max_rank: int,
        share: float,
        *,
        energy: float | None = None,
        cautious: bool = False,
    ) -> dict[str, LowRankChange]:
        """The change of every weight; RainError where the system cannot be solved.

        epsilon: None: for each weight the ε of `largest_of`, by the errors held aside, or EPSILON
        where none are. energy: what the penalty is relative to, where it is not the mean energy of
        a feature of these inputs. cautious: no change, of rank 0, where every ε would add to the
        errors held aside.
        """
        self._fitted.flush()
        if energy is None:
            energy = require_energy(self._fitted.gram) / self._features
        root_of = self._roots(epsilon, energy)
        found: dict[str, LowRankChange] = {}
        for name, cross in self._fitted.cross.items():
            root, chosen, helps = root_of(name)
            most = max_rank if helps or not cautious else 0
            solver = RidgeSolver(root, chosen)
            found[name] = solver.change(cross, self._fitted.energy[name], most, share)
        return found

    def _roots(self, epsilon: float | None, energy: float) -> Callable[[str], Chosen]:
        gram, aside = self._fitted.gram, self._aside
        if epsilon is None and aside is not None:
            aside.flush()
            if any(aside.energy.values()):
                return self._chosen(Spectrum.of(gram, energy), aside)
        fixed = EPSILON if epsilon is None else epsilon
        root = CholeskyRoot.of(gram, fixed, energy)
        return lambda _: (root, fixed, True)

    def _chosen(self, spectrum: Spectrum, aside: TokenSums) -> Callable[[str], Chosen]:
        unseen = spectrum.vectors.mT @ aside.gram @ spectrum.vectors

        def root_of(name: str) -> Chosen:
            fitted = self._fitted.cross[name] @ spectrum.vectors
            held = aside.cross[name] @ spectrum.vectors
            along, across = (fitted * held).sum(0), (fitted.mT @ fitted) * unseen

            def left(epsilon: float) -> float:
                """Σ w ‖e - D x‖² over the tokens held aside, without Σ w ‖e‖²."""
                inverse = spectrum.inverse(epsilon)
                return float(inverse @ across @ inverse - 2 * along @ inverse)

            errors = {epsilon: left(epsilon) for epsilon in CANDIDATES}
            epsilon = largest_of(errors)
            return spectrum.root(epsilon), epsilon, errors[epsilon] < 0

        return root_of


def largest_of(errors: Mapping[float, float]) -> float:
    """The largest ε that removes KEPT of the error that the best one removes.

    errors: by ε, the error held aside with the change less the error without one. Where no ε
    removes any, the one that adds least.
    """
    best = min(errors.values())
    allowed = KEPT * best if best < 0 else best
    return max(epsilon for epsilon, error in errors.items() if error <= allowed)


def exact(rows: Tensor) -> Tensor:
    """The rows in float32, or in float64 if they are."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
