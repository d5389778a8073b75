"""The models of a merge, also where they are listed by slices of layers or by modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit.config import (
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)

from rain_mergekit.errors import RainError
from rain_mergekit.system.untrusted_input import shown


@dataclass(frozen=True)
class ListedModels:
    """The models with their parameters.

    layers: how many the slices have together, None where there are no slices. strengths: the
    `lambda` of slices or of the module, by what it is for, where one has its own. own_parameters:
    all that slices or the module have of their own, by name and what it is for.
    """

    models: Sequence[InputModelDefinition]
    layers: int | None
    strengths: dict[str, Any]
    own_parameters: dict[str, Any] = field(default_factory=dict)


def listed_models(merge: MergeConfiguration, source: str) -> ListedModels:
    """From `models:`, from `slices:` that leave every layer in its place, or from one module.

    mergekit itself writes all merges of `mergekit-multi` as one module with slices. RainError names
    what `source` has instead.
    """
    if merge.models:
        return ListedModels(merge.models, None, {})
    module = _one_module(merge, source)
    own = {"the module": (module.parameters if module else None) or {}}
    if module and module.models:
        return _listed(module.models, None, own)
    slices = (module.slices if module else merge.slices) or []
    layers = _layers_in_place(slices, merge, source)
    for one in slices:
        first, end = one.sources[0].layer_range
        own[f"layers {first} to {end - 1}"] = one.parameters or {}
    return _listed(_models(slices[0].sources), layers, own)


def _listed(
    models: Sequence[InputModelDefinition], layers: int | None, own: Mapping[str, Mapping[str, Any]]
) -> ListedModels:
    strengths = {place: given["lambda"] for place, given in own.items() if "lambda" in given}
    named = {
        f"{name} ({place})": value for place, given in own.items() for name, value in given.items()
    }
    return ListedModels(models, layers, strengths, named)


def _one_module(merge: MergeConfiguration, source: str) -> OutputModuleDefinition | None:
    """The only module; None if there is none, RainError if there are several."""
    modules = merge.modules or {}
    if len(modules) > 1:
        raise RainError(
            f"{source}: modules: {len(modules)} of them are listed ({shown(', '.join(modules))}); "
            "rain merges the decoder alone: list the models under `models:`"
        )
    return next(iter(modules.values()), None)


def _layers_in_place(
    slices: Sequence[OutputSliceDefinition], merge: MergeConfiguration, source: str
) -> int:
    """The number of layers; RainError if one is not at its place in the models."""
    end = 0
    listed = {part.model for part in slices[0].sources}
    if merge.base_model is not None and merge.base_model not in listed:
        raise RainError(
            f"{source}: slices: 0: base_model is not among its models; mergekit wants it listed "
            "in every slice, without a role"
        )
    for number, one in enumerate(slices):
        where = f"{source}: slices: {number}"
        ranges = {part.layer_range for part in one.sources}
        if len(ranges) != 1 or one.sources[0].layer_range[0] != end:
            found = ", ".join(map(str, sorted(map(list, ranges))))
            raise RainError(
                f"{where}: layer_range {found}, expected one that begins at {end} for all models: "
                "rain merges layers in their own places; merge first, move layers afterwards"
            )
        if one.base_model not in (None, merge.base_model):
            raise RainError(f"{where}: base_model is another one than that of the whole merge")
        if _models(one.sources) != _models(slices[0].sources):
            raise RainError(
                f"{where}: its models or their roles are others than those of the first slice; "
                "rain merges the same three models in all layers"
            )
        end = one.sources[0].layer_range[1]
    return end


def _models(sources: Sequence[InputSliceDefinition]) -> list[InputModelDefinition]:
    found: Iterator[InputModelDefinition] = (
        InputModelDefinition(model=one.model, parameters=one.parameters) for one in sources
    )
    return sorted(found, key=lambda one: str(one.model))
