"""How far a merge moved each weight, relative to its norm."""

from __future__ import annotations

import math

import torch

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.errors import RainError
from rain_mergekit.evaluation.stored_weights import CheckpointWeights, grouped, short_names
from rain_mergekit.models.checkpoint import Checkpoint

_ROWS = 4096


def relative_weight_change(
    file: CalibrationFile, reasoning: Checkpoint, merged: Checkpoint
) -> dict[str, dict[int, float]]:
    """||W* - W_R|| / ||W_R|| (Frobenius) of the listed weights, by module and layer.

    The experts of a layer are taken together. Two tensors are in memory at a time. Raises
    RainError where one is missing or of another shape.
    """
    groups = grouped(file)
    names, models = (
        short_names(kind for kind, _ in groups),
        (CheckpointWeights(reasoning), CheckpointWeights(merged)),
    )
    found: dict[str, dict[int, float]] = {}
    for (kind, layer), members in groups.items():
        pairs = (_change(*models, name, tokens=file.tensors[name].tokens) for name in members)
        norms, changes = zip(*pairs, strict=True)
        norm = math.hypot(*norms)
        found.setdefault(names[kind], {})[layer] = math.hypot(*changes) / norm if norm else 0.0
    return found


def _change(
    reasoning: CheckpointWeights, merged: CheckpointWeights, name: str, *, tokens: bool
) -> tuple[float, float]:
    """||W_R|| and ||W* - W_R||, in float32 by blocks; for token rows, only those that both have."""
    before, after = reasoning.get(name), merged.get(name)
    if tokens:
        before, after = (weight[: min(len(before), len(after))] for weight in (before, after))
    if before.shape != after.shape:
        raise RainError(
            f"{merged.checkpoint.reference}: tensor {name} has shape {list(after.shape)}, expected "
            f"{list(before.shape)}: it was not merged from {reasoning.checkpoint.reference}"
        )
    parts = list(zip(torch.split(before, _ROWS), torch.split(after, _ROWS), strict=True))
    norms = [float(old.float().norm()) for old, _ in parts]
    changes = [float((new.float() - old.float()).norm()) for old, new in parts]
    return math.hypot(*norms), math.hypot(*changes)
