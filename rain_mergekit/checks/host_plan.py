"""Tensors that mergekit will require and not find, reported before the calibration."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mergekit.architecture import WeightInfo, arch_info_for_config

from rain_mergekit.errors import RainError
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.loading import merged_folders, read_model_config
from rain_mergekit.models.merge_names import Found, Names, has_table

_SHOWN = 3


def require_found(models: Mapping[str, Checkpoint]) -> None:
    """RainError if a model, by role, lacks a tensor that mergekit requires of it.

    Only headers are read. mergekit itself would report a missing tensor only in the middle of the
    merge, under every merge method.
    """
    for role, checkpoint in models.items():
        model_config = read_model_config(checkpoint)
        architecture = arch_info_for_config(model_config) if model_config.architectures else None
        if architecture is None:
            continue  # mergekit uses the names in the checkpoint: `require_shared`
        try:
            weights = architecture.all_weights(model_config)
        except (RuntimeError, AttributeError, TypeError):
            continue  # reported with its cause where the table is read
        found = Found.of(checkpoint.names, model_config.model_type)
        _require(role, checkpoint, list(_absent(weights, found)))


def require_shared(
    models: Mapping[str, Checkpoint], config: Any, names: Names, merged: Iterable[str]
) -> None:
    """RainError if mergekit finds a tensor in one of the models and not in another one.

    That is so where one of the three was saved with another prefix, and mergekit has no table of
    the architecture. Only headers are read.

    Args:
        models: by role.
        config: the reasoning model's.
        names: what mergekit calls its tensors.
        merged: the weights to be merged, by the names of the model.
    """
    if has_table(config):
        return
    targets = {name: [target.name for target in names(name)] for name in merged}
    own = Found.of(models["reasoning"].names, config.model_type)
    lost = [name for name, found in targets.items() if not found and not own(name)]
    if len(lost) < len(targets):  # else it has another prefix, or all three have
        lost = [n for n in lost if any(n in checkpoint.names for checkpoint in models.values())]
    _require("reasoning", models["reasoning"], lost)
    listed = [name for found in targets.values() for name in found]
    for role, checkpoint in models.items():
        there = Found.of(checkpoint.names, config.model_type)
        _require(role, checkpoint, [name for name in listed if not there(name)])


def _require(role: str, checkpoint: Checkpoint, absent: Sequence[str]) -> None:
    if absent:
        more = f" and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
        raise RainError(
            f"mergekit cannot merge the {role} model {checkpoint.reference} by any method: it "
            f"looks for {', '.join(absent[:_SHOWN])}{more}, and the checkpoint has "
            f"{_nearest(absent[0], checkpoint.names)} instead; save the model with the "
            "transformers with which it was published, or use another mergekit"
        )


def adapter_warning(models: Mapping[str, Checkpoint], config: Any) -> str | None:
    """A warning where stock mergekit takes no model with an adapter: it has no table for them."""
    found = merged_folders(models)
    if not found or has_table(config):
        return None
    return (
        f"mergekit-yaml takes no model with an adapter of the architecture {config.model_type!r} "
        f"({next(iter(found))}): merge with `mergekit-rain merge`, which merges the adapter first"
    )


def _absent(weights: Iterable[WeightInfo], found: Found) -> Iterator[str]:
    """The names of the required tensors that are not found under any of their names."""
    for weight in weights:
        tied = any(map(found.named, weight.tied_names or ()))
        if not weight.optional and not tied and not any(map(found, _names(weight))):
            yield weight.name


def _names(weight: WeightInfo) -> list[str]:
    return [weight.name, *(weight.aliases or ())]


def _nearest(name: str, names: Collection[str]) -> str:
    """A stored name with the same ending, for the message."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        end = ".".join(parts[-count:])
        if found := sorted(other for other in names if other.endswith(f".{end}")):
            return found[0]
    return min(names, default="nothing")
