"""The task vectors of a calibration's three models: norms and principal directions.

Read from the checkpoints one weight at a time, for the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.schema import ROLES, TensorPlan
from rain_mergekit.evaluation.stored_weights import CheckpointWeights, grouped, short_names
from rain_mergekit.linalg.factors import Factors
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.fingerprint import fingerprint
from rain_mergekit.system.evenly_spaced import evenly_spaced
from rain_mergekit.system.wording import counted

EXPERTS = 4  # of one layer whose subspaces are compared
SMALL = 512  # up to this size a matrix is decomposed exactly
_EXTRA, _ROUNDS = 16, 6
_NOISE = 1e-4  # of float32 differences of float16 weights


@dataclass(frozen=True)
class Overlap:
    """How much two principal subspaces share, 0 to 1; `chance`: the value for random subspaces."""

    left: float
    right: float
    chance_left: float
    chance_right: float

    @classmethod
    def mean(cls, found: Sequence[Overlap]) -> Overlap:
        """The mean of at least one overlap."""
        return cls(*(fmean(getattr(one, item.name) for one in found) for item in fields(cls)))


@dataclass(frozen=True)
class Change:
    """One weight: Frobenius norms of Δ and of what is merged of it at λ = 1, and the overlap.

    The overlap is that of θ_I - θ_B and θ_R - θ_B; None where one of them is zero. Of the experts
    of a layer these are means.
    """

    module: str
    layer: int
    before: float
    after: float
    overlap: Overlap | None


@dataclass(frozen=True)
class TaskVectors:
    """All weights that could be read, and remarks on those that could not."""

    changes: tuple[Change, ...]
    rank: int
    remarks: tuple[str, ...]


def unreachable(file: CalibrationFile) -> str | None:
    """Why the models cannot be read without a download; None if all three are local folders."""
    away = [role for role in ROLES if not Path(file.models[role].reference).is_dir()]
    if not away:
        return None
    names = ", ".join(f"{file.models[role].reference} ({role})" for role in away)
    return f"not a folder on this machine: {names}"


def differing(file: CalibrationFile, models: Mapping[str, Checkpoint]) -> list[str]:
    """The roles whose checkpoint is not the one that was recorded."""
    return [
        role
        for role, recorded in file.models.items()
        if recorded.fingerprint and recorded.differences(fingerprint(models[role].path))
    ]


def measure_task_vectors(
    file: CalibrationFile,
    models: Mapping[str, Checkpoint],
    rank: int,
    device: str = "cpu",
    tick: Callable[[int], object] = lambda _done: None,
) -> TaskVectors:
    """Norms and overlaps of every listed weight; `tick` is told of each.

    rank: of the principal subspaces. Of a layer's experts the means are given; overlaps are those
    of a few of them, evenly spaced. One weight of the three models is in memory at a time, one
    matrix of it in float32. RainError if a checkpoint cannot be read.
    """
    weights = _Weights(
        file, {role: CheckpointWeights(model) for role, model in models.items()}, device, tick
    )
    groups = {
        place: kept
        for place, members in grouped(file).items()
        if (kept := [name for name in members if not file.tensors[name].tokens])
    }
    names = short_names(kind for kind, _ in groups)
    changes, most = [], 1
    for (kind, layer), members in groups.items():
        count = weights.count(members)
        chosen = set(evenly_spaced(range(count), EXPERTS))
        parts = [
            _part(rank if index in chosen else 0, *matrices)
            for index, matrices in enumerate(weights.matrices(members))
        ]
        most = max(most, count)
        if parts:
            changes.append(_mean(names[kind], layer, parts))
    for model in models.values():
        model.release()
    tokens = [name for name, plan in file.tensors.items() if plan.tokens]
    tick(len(tokens))
    remarks = tuple(_remarks(most, len(weights.left_out), tokens))
    return TaskVectors(tuple(changes), rank, remarks)


def _remarks(experts: int, left_out: int, tokens: Sequence[str]) -> Iterator[str]:
    if tokens:
        yield f"Of {', '.join(tokens)}, with a row for each token, nothing is shown here"
    if experts > 1:
        yield (
            f"Of the {experts} experts of a layer the means are shown; the overlap is that of "
            f"{min(experts, EXPERTS)} of them"
        )
    if left_out:
        yield (
            f"Left out, as not all of the three models have them under these names: "
            f"{counted(left_out, 'weight')}"
        )


class _Weights:
    """Single matrices of the weights that the calibration file lists, in all three models."""

    def __init__(
        self,
        file: CalibrationFile,
        models: Mapping[str, CheckpointWeights],
        device: str,
        tick: Callable[[int], object],
    ) -> None:
        self._file, self._device, self._tick = file, torch.device(device), tick
        self._models = [models[role] for role in ("instruct", "pretrained", "reasoning")]

    @cached_property
    def left_out(self) -> set[str]:
        """Names of the weights that one of the models does not have."""
        return {
            name
            for name, plan in self._file.tensors.items()
            if not plan.tokens and any(name not in model for model in self._models)
        }

    def count(self, names: Sequence[str]) -> int:
        """How many matrices these weights hold."""
        shapes = (self._file.tensors[name].shape for name in names if name not in self.left_out)
        return sum(1 if len(shape) == 2 else shape[0] for shape in shapes)

    def matrices(self, names: Sequence[str]) -> Iterator[tuple[Tensor, ...]]:
        """For each matrix: the two task vectors, Δ, and what is merged of it; (d_out, d_in)."""
        for name in names:
            if name not in self.left_out:
                plan = self._file.tensors[name]
                stored = [model.get(name) for model in self._models]
                if len(plan.shape) == 2:
                    stored = [weight[None] for weight in stored]
                for expert, weights in enumerate(zip(*stored, strict=True)):
                    yield self._change(plan, expert, weights)
            self._tick(1)

    def _change(
        self, plan: TensorPlan, expert: int, weights: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        instruct, pretrained, reasoning = (w.to(self._device, torch.float32) for w in weights)
        tuned, thinking = instruct - pretrained, reasoning - pretrained
        if plan.input_axis == -2:
            tuned, thinking = tuned.mT, thinking.mT
        site = plan.site[expert] if isinstance(plan.site, tuple) else plan.site
        factors = None if site is None else self._file.factors(site)
        rows, cols = self._file.scale(plan.rows), self._file.scale(plan.cols)
        added = self._added(plan, expert)
        delta = tuned - self._file.gamma * thinking if self._file.gamma else tuned
        merged = plan.start * (tuned - thinking)
        if plan.projected:
            merged = merged_part(delta, factors, rows, cols)
        if added is not None:
            merged = merged + added[0].to(tuned) @ added[1].to(tuned).mT
        return tuned, thinking, delta, merged

    def _added(self, plan: TensorPlan, expert: int) -> tuple[Tensor, Tensor] | None:
        """A and B of a weight, or of one of the experts that it holds."""
        added = self._file.change(plan)
        if added is None or not plan.ranks:
            return added
        a, b = (torch.split(one, list(plan.ranks), dim=1)[expert] for one in added)
        return a, b


def _part(
    rank: int, tuned: Tensor, thinking: Tensor, delta: Tensor, merged: Tensor
) -> tuple[float, float, Overlap | None]:
    shared = overlap(tuned, thinking, rank) if rank else None
    return _norm(delta), _norm(merged), shared


def _mean(module: str, layer: int, parts: Sequence[tuple[float, float, Overlap | None]]) -> Change:
    shared = [found for _, _, found in parts if found is not None]
    return Change(
        module=module,
        layer=layer,
        before=fmean(before for before, _, _ in parts),
        after=fmean(after for _, after, _ in parts),
        overlap=Overlap.mean(shared) if shared else None,
    )


def merged_part(
    delta: Tensor, factors: Factors | None, rows: Tensor | None, cols: Tensor | None
) -> Tensor:
    """(S_row Δ S_col)(I - U Vᵀ) for delta (d_out, d_in), float32."""
    for scale, shape in ((rows, (-1, 1)), (cols, (1, -1))):
        if scale is not None:
            delta = delta * scale.to(delta).reshape(shape)
    return delta if factors is None else factors.project(delta)


def overlap(first: Tensor, second: Tensor, rank: int) -> Overlap | None:
    """‖A_kᵀ B_k‖² / k for the top-k left, and right, singular vectors of two m x n matrices.

    k is `rank`, or less where one of them has fewer directions; None where one is zero.
    """
    found = [principal(matrix, rank) for matrix in (first, second)]
    k = min(left.shape[1] for left, _ in found)
    if not k:
        return None
    (left_a, right_a), (left_b, right_b) = ((u[:, :k], v[:, :k]) for u, v in found)
    pairs = ((left_a, left_b), (right_a, right_b))
    left, right = (float((a.mT @ b).square().sum()) / k for a, b in pairs)
    return Overlap(left, right, k / first.shape[0], k / first.shape[1])


def principal(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The top left (m, k) and right (n, k) singular vectors, k <= rank, in order.

    Exact for small matrices, else by subspace iteration from a fixed start. Directions below 1e-4
    of the largest are left out.
    """
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= SMALL:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        return _significant(u[:, :rank], s[:rank], vt[:rank].mT)
    width = min(rank + _EXTRA, *matrix.shape)
    start = torch.Generator().manual_seed(0)
    right = torch.randn(matrix.shape[1], width, generator=start).to(matrix)
    for _ in range(_ROUNDS):
        left = torch.linalg.qr(matrix @ right).Q
        right = torch.linalg.qr(matrix.mT @ left).Q
    u, s, vt = torch.linalg.svd(matrix @ right, full_matrices=False)
    return _significant(u[:, :rank], s[:rank], (right @ vt.mT)[:, :rank])


def _significant(u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    count = int((s > _NOISE * s.max()).sum()) if s.numel() else 0
    return u[:, :count], v[:, :count]


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def by_module(
    changes: Iterator[Change] | tuple[Change, ...], value: Callable[[Change], float | None]
) -> dict[str, dict[int, float]]:
    """A quantity by module and layer; weights that have none are left out."""
    found: dict[str, dict[int, float]] = {}
    for change in changes:
        if (number := value(change)) is not None:
            found.setdefault(change.module, {})[change.layer] = number
    return found
