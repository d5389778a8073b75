"""Stream matching of routed experts: each sees the tokens that the merged model gives it.

Experts are fitted when all other maps of their layer are: first what each one's first projection
gives, then by the second ones what the layer still lacks. The router stays the reasoning model's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rain_mergekit.calibration.expert_rows import ExpertBatch, ExpertRows
from rain_mergekit.calibration.fit_rule import FitRule, directions_within
from rain_mergekit.calibration.site_sums import Sums, sums_within
from rain_mergekit.errors import RainError
from rain_mergekit.linalg.landmarks import evenly_by_weight
from rain_mergekit.linalg.ridge_fit import RidgeSums
from rain_mergekit.linalg.ridge_solver import LowRankChange
from rain_mergekit.models.experts import (
    ExpertsCall,
    activated,
    expert_linear,
    expert_product,
    normalised,
)
from rain_mergekit.system.distributed import World
from rain_mergekit.system.memory import trim_heap
from rain_mergekit.system.profile import SOLVE, phase

LOG = logging.getLogger(__name__)
# With fewer fitted tokens an expert stays as it is.
LEAST_TOKENS = 8


@dataclass(frozen=True)
class _Projection:
    """One of the two projections of every expert.

    name: of its parameter; rows: d_out; width: d_in. inputs, errors: of a batch of an expert's
    tokens, (m, d_in) and (m, d_out).
    """

    name: str
    rows: int
    width: int
    inputs: Callable[[int, ExpertBatch], Tensor]
    errors: Callable[[int, ExpertBatch], Tensor]


@dataclass(frozen=True)
class ExpertsFit:
    """The experts of one module: tokens of each, and of each weight those that stay as they are.

    few: with too few tokens. worse: where every change would be worse on the texts held out.
    """

    tokens: tuple[int, ...]
    few: tuple[int, ...]
    worse: Mapping[str, tuple[int, ...]]


class ExpertFitter:
    """Fits the experts of one module of a layer, one after the other."""

    def __init__(
        self, name: str, call: ExpertsCall, rows: ExpertRows, rule: FitRule, world: World
    ) -> None:
        """name: of the module in the layer; call: one use of it, for its form."""
        self.name, self.rows, self._call = name, rows, call
        self.module: Any = call.module
        self._rule, self._world = rule, world
        self.changes: dict[tuple[str, int], LowRankChange] = {}
        self.added: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._worse: dict[str, list[int]] = {}

    @property
    def fits_down(self) -> bool:
        """Whether what an expert gives is a linear map of its inner features."""
        return not normalised(self.module)

    def fit_up(self, other: nn.Module) -> None:
        """Fit each expert's first projection; other: the same module of the instruct model."""
        name = self._call.up

        def errors(expert: int, batch: ExpertBatch) -> Tensor:
            missing = expert_linear(self.module, name, expert, batch.lag)
            taught = bool(batch.share.any())
            if taught:
                missing = missing + expert_linear(other, name, expert, batch.other)
            if self.module.has_bias:
                missing = missing + (batch.keep - 1)[:, None] * self._bias(self.module, expert)
                missing = missing + batch.share[:, None] * self._bias(other, expert)
            return missing

        self._fit(self._projection(name, lambda _, batch: batch.inputs, errors))

    def fit_down(self) -> None:
        """Fit each expert's second projection to what the layer lacks."""
        up, down = self._call.up, self._call.down

        def inputs(expert: int, batch: ExpertBatch) -> Tensor:
            product = expert_product(self.module, up, expert, batch.inputs, self.added)
            return activated(self.module, product)

        def errors(_expert: int, batch: ExpertBatch) -> Tensor:
            return batch.after / batch.total.clamp(min=1e-6)[:, None]

        self._fit(self._projection(down, inputs, errors))

    def report(self) -> ExpertsFit:
        """What became of each expert."""
        tokens = self._tokens()
        return ExpertsFit(
            tokens=tuple(tokens),
            few=tuple(e for e, count in enumerate(tokens) if count < LEAST_TOKENS),
            worse={name: tuple(found) for name, found in self._worse.items()},
        )

    def _projection(
        self,
        name: str,
        inputs: Callable[[int, ExpertBatch], Tensor],
        errors: Callable[[int, ExpertBatch], Tensor],
    ) -> _Projection:
        shape = self.module.get_parameter(name).shape
        axis = self.axis
        return _Projection(name, int(shape[-3 - axis]), int(shape[axis]), inputs, errors)

    @property
    def axis(self) -> int:
        """The axis of the input features in the weights: -1, or -2 where they are transposed."""
        return -2 if self._call.transposed else -1

    def _bias(self, module: Any, expert: int) -> Tensor:
        found: Tensor = getattr(module, f"{self._call.up}_bias")[expert]
        return found

    def _tokens(self) -> list[int]:
        found: list[int] = self._world.sum(self.rows.counts(self._call.count)).tolist()
        return found

    def _fit(self, projection: _Projection) -> None:
        energy, name = self._energy(projection), projection.name
        self._worse[name] = []
        for expert, count in enumerate(self._tokens()):
            if count < LEAST_TOKENS:
                continue
            trim_heap()
            with phase(SOLVE):
                change = self._solve(projection, expert, count, energy)
            if change.rank:
                self.changes[name, expert] = change
                self.added[name, expert] = change.a, change.b
            elif change.wanted:  # else there is nothing to change
                self._worse[name].append(expert)

    def _energy(self, projection: _Projection) -> float:
        """The mean energy of an input feature, and of that the mean over the experts."""
        total = torch.zeros(1, dtype=torch.float64)
        for expert in range(self._call.count):
            for batch in self._batches(expert):
                if not batch.aside:
                    squares = projection.inputs(expert, batch).double().square().sum(1)
                    total += (squares @ _weights(batch)).cpu()
        return float(self._world.sum(total)) / projection.width / self._call.count

    def _solve(
        self, projection: _Projection, expert: int, count: int, energy: float
    ) -> LowRankChange:
        name, rule = projection.name, self._rule
        sums = self._empty(projection, expert, count)
        for batch in self._batches(expert):
            inputs, errors = projection.inputs(expert, batch), projection.errors(expert, batch)
            sums.add(inputs, {name: errors}, _weights(batch), aside=batch.aside)
        sums.sum_over(self._world.sum)
        try:
            change = sums.changes(
                rule.epsilon, rule.max_rank, rule.share, energy=energy, cautious=True
            )[name]
        except RainError as error:
            where = f"{self.name}.{name}, expert {expert}"
            raise RainError(f"{where}: {error}") from None
        return replace(change, a=change.a.float(), b=change.b.float())

    def _empty(self, projection: _Projection, expert: int, count: int) -> Sums:
        """Sums of d x d, or within the directions of the tokens where these are fewer."""
        outputs, choose = {projection.name: projection.rows}, self._rule.epsilon is None
        most = min(directions_within(projection.width, self._rule.budget), count)
        if most == projection.width:
            return RidgeSums(projection.width, outputs, self._world.device, choose=choose)
        own = torch.cat(list(self._landmarks(projection, expert, most / count)))
        return sums_within(own, outputs, self._world, choose=choose)

    def _landmarks(self, projection: _Projection, expert: int, share: float) -> Iterator[Tensor]:
        """That share of the expert's fitted tokens, spread by weight."""
        yield torch.empty(0, projection.width, device=self._world.device)
        for batch in self._batches(expert):
            if not batch.aside:
                weights = _weights(batch)
                kept = evenly_by_weight(weights, max(1, int(share * len(weights) + 1e-9)))
                yield projection.inputs(expert, batch)[kept.to(weights.device)]

    def _batches(self, expert: int) -> Iterator[ExpertBatch]:
        return self.rows.batches(expert, self._world.device)


def _weights(batch: ExpertBatch) -> Tensor:
    """An error of the expert counts in the layer's output as much as its gate lets through."""
    return batch.weights * batch.gates.double().square()
