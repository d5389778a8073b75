"""Which tensors differ between two checkpoints, and by how much."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rain_mergekit.calibration_file.site_names import locate, module_order
from rain_mergekit.errors import RainError
from rain_mergekit.models.checkpoint import Checkpoint

_ROWS = 4096


@dataclass(frozen=True)
class TensorChange:
    """One tensor that both have: ||A||, ||B - A|| (Frobenius), and the share of entries changed.

    cosine: of A and B as vectors; NaN where one is zero. layer: None outside of the layers.
    """

    name: str
    kind: str
    layer: int | None
    norm: float
    change: float
    changed: float
    cosine: float

    @property
    def relative(self) -> float:
        """||B - A|| / ||A||; infinite for what was zero and is not any more."""
        if self.norm:
            return self.change / self.norm
        return math.inf if self.change else 0.0

    @property
    def equal(self) -> bool:
        """Every entry is the same number."""
        return self.changed == 0


@dataclass(frozen=True)
class ModelDiff:
    """All tensors of both; `reshaped`: shapes in A and in B where they differ.

    Of such a tensor with a row a token the rows that both have are compared too.
    """

    changes: tuple[TensorChange, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def relative(self) -> float:
        """||B - A|| / ||A|| over all tensors that both have."""
        return _together(self.changes)

    @property
    def kinds(self) -> dict[str, tuple[TensorChange, ...]]:
        """The tensors by kind, in the order of a layer's computation."""
        found: dict[str, list[TensorChange]] = {}
        for one in self.changes:
            found.setdefault(one.kind, []).append(one)
        order = sorted(found, key=lambda kind: (found[kind][0].layer is None, module_order(kind)))
        return {kind: tuple(found[kind]) for kind in order}


def by_layer(changes: Iterable[TensorChange]) -> dict[int, float]:
    """Relative change by layer; tensors of one layer (experts) are taken together."""
    groups: dict[int, list[TensorChange]] = {}
    for one in changes:
        if one.layer is not None:
            groups.setdefault(one.layer, []).append(one)
    return {layer: _together(groups[layer]) for layer in sorted(groups)}


def _together(group: Sequence[TensorChange]) -> float:
    norm = math.hypot(*(one.norm for one in group))
    return math.hypot(*(one.change for one in group)) / norm if norm else 0.0


def diff_models(
    first: Checkpoint, second: Checkpoint, tick: Callable[[int], object] = lambda _done: None
) -> ModelDiff:
    """Compare tensor by tensor, under the names of the files; `tick` is told of each.

    RainError where they have no tensor in common, or one cannot be read.
    """
    shared = sorted(first.names & second.names)
    if not shared:
        raise RainError(
            f"{first.reference} and {second.reference} have no tensor name in common: they are of "
            "two architectures, or stored in two layouts"
        )
    before, after = first.shapes(shared), second.shapes(shared)
    reshaped = {n: (before[n], after[n]) for n in shared if before[n] != after[n]}
    changes = []
    for name in shared:
        if before[name][1:] == after[name][1:]:
            changes.append(compare_tensors(name, first.get(name), second.get(name)))
        tick(1)
    for model in (first, second):
        model.release()
    return ModelDiff(
        changes=tuple(changes),
        only_first=tuple(sorted(first.names - second.names)),
        only_second=tuple(sorted(second.names - first.names)),
        reshaped=reshaped,
    )


def compare_tensors(name: str, before: Tensor, after: Tensor) -> TensorChange:
    """Compare one tensor: float64 sums over the rows that both models have, block by block."""
    layer, kind = locate(name.removesuffix(".weight"))
    before, after = (one if one.dim() else one[None] for one in (before, after))
    rows = min(len(before), len(after))
    square = apart = other = product = 0.0
    changed = count = 0
    blocks = (torch.split(one[:rows], _ROWS) for one in (before, after))
    for old, new in zip(*blocks, strict=True):
        a, b = old.double(), new.double()
        square += float((a * a).sum())
        other += float((b * b).sum())
        product += float((a * b).sum())
        apart += float((b - a).square().sum())
        changed += int((a != b).sum())
        count += a.numel()
    both = math.sqrt(square * other)
    return TensorChange(
        name=name,
        kind=kind,
        layer=layer,
        norm=math.sqrt(square),
        change=math.sqrt(apart),
        changed=changed / count if count else 0.0,
        cosine=product / both if both else math.nan,
    )
