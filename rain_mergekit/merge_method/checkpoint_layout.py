"""Gives a merged model the tensor names and the layout of the reasoning model's checkpoint.

Without a table for an architecture mergekit writes what transformers' modules hold: other names,
and one tensor for all experts where the checkpoint has one for each, which servers do not load.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path

import torch
from torch import Tensor

from rain_mergekit.errors import RainError
from rain_mergekit.models.merge_names import Names
from rain_mergekit.models.model_tensors import ModelTensors
from rain_mergekit.models.weight_files import (
    open_weights,
    replace_weights,
    weight_files,
)


def restore_layout(folder: Path, reasoning: ModelTensors, names: Names) -> bool:
    """Rewrite the weight files whose tensors have other names or another layout.

    names: what mergekit calls the tensors. Says whether anything was changed.
    """
    origin = _origins(reasoning, names)
    changed = False
    for path in weight_files(folder):
        with open_weights(path) as weights:
            if not origin.keys() & weights.names:
                continue
            tensors: dict[str, Tensor] = {}
            for name in weights.names:
                if name in origin:
                    tensors.update(in_parts(reasoning, origin[name], weights.get(name)))
                else:
                    tensors[name] = weights.get(name)
        replace_weights(path, tensors)
        changed = True
    return changed


def is_restored(there: AbstractSet[str], reasoning: ModelTensors, names: Names) -> bool:
    """Whether tensors of these names are called as in the reasoning model's checkpoint."""
    return not _origins(reasoning, names).keys() & there


def _origins(reasoning: ModelTensors, names: Names) -> dict[str, str]:
    """The model's name of each tensor whose name in the result is not in the checkpoint."""
    origin = {name: name for name in reasoning.sources}
    for name, source in reasoning.sources.items():
        targets = names(name)
        if len(targets) == 1 and targets[0].expert is None and len(source.parts) == 1:
            origin.setdefault(targets[0].name, name)
    own = reasoning.checkpoint.names
    return {result: name for result, name in origin.items() if result not in own}


def in_parts(reasoning: ModelTensors, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor of the model as the checkpoint stores it: under its name there, or in parts."""
    source = reasoning.sources[name]
    if source.name is not None:
        return {source.name: tensor}
    return dict(_divided(reasoning, name, tensor))


def _divided(reasoning: ModelTensors, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Undo a conversion that only moves numbers, by tracking where each one goes."""
    parts = [part for part, _ in reasoning.sources[name].parts]
    shapes = reasoning.checkpoint.shapes(parts)
    sizes = [math.prod(shapes[part]) for part in parts]
    total = sum(sizes)
    kind = torch.int32 if total < torch.iinfo(torch.int32).max else torch.int64
    numbers = torch.split(torch.arange(total, dtype=kind), sizes)
    blocks = zip(parts, numbers, strict=True)
    numbered = {part: block.view(shapes[part]) for part, block in blocks}
    places = reasoning.assembled(name, numbered.__getitem__).flatten()
    if len(places) != total or tensor.numel() != total:
        raise RainError(
            f"{name}: {len(parts)} tensors of the checkpoint make it up, and it cannot be split "
            "into them again"
        )
    flat = torch.empty(total, dtype=tensor.dtype)
    flat[places.long()] = tensor.flatten()
    for part, block in zip(parts, torch.split(flat, sizes), strict=True):
        yield part, block.view(shapes[part]).clone()
