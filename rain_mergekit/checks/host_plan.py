"""Tensors that mergekit will require and not find, reported before the calibration."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mergekit.architecture import WeightInfo, arch_info_for_config
from mergekit.architecture.conversion import can_convert_checkpoint_keys

from rain_mergekit.errors import RainError
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.loading import merged_folders, read_model_config
from rain_mergekit.models.merge_names import has_table, layer_of

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
            continue  # mergekit uses the names in the checkpoint
        try:
            weights = architecture.all_weights(model_config)
        except (RuntimeError, AttributeError, TypeError):
            continue  # reported with its cause where the table is read
        absent = list(_absent(weights, checkpoint.names, model_config.model_type))
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


def _absent(
    weights: Collection[WeightInfo], names: Collection[str], model_type: str
) -> Iterator[str]:
    """The names of the required tensors that are there neither by name nor by a conversion."""
    by_layer: dict[str | None, set[str]] = {}
    for name in names:
        by_layer.setdefault(layer_of(name), set()).add(name)
    for weight in weights:
        single = [weight.name, *(weight.aliases or ())]
        if weight.optional or any(n in names for n in (*single, *(weight.tied_names or ()))):
            continue
        near = by_layer.get(layer_of(weight.name), set())
        if not any(can_convert_checkpoint_keys(model_type, near, name) for name in single):
            yield weight.name


def _nearest(name: str, names: Collection[str]) -> str:
    """A stored name with the same ending, for the message."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        end = ".".join(parts[-count:])
        if found := sorted(other for other in names if other.endswith(f".{end}")):
            return found[0]
    return min(names, default="nothing")
