"""A merge without calibration, read from a merged model's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from rain_mergekit.config.listed_models import listed_models
from rain_mergekit.config.merge_config import (
    MergeRecipe,
    merge_configuration,
    parse_recipe,
    parse_yaml,
    read_text,
)
from rain_mergekit.config.method_names import RAIN, REGMEAN
from rain_mergekit.errors import RainError
from rain_mergekit.system.untrusted_input import shown


@dataclass(frozen=True)
class PlainMerge:
    """The method, the models by their place (`base`, `model 1`, ...), and the parameters.

    own: the parameters of each model, by the same names.
    """

    method: str
    models: Mapping[str, ModelReference]
    own: Mapping[str, Mapping[str, Any]]
    parameters: Mapping[str, Any]

    @property
    def main(self) -> ModelReference:
        """The model that the result is closest to: the first that is merged into the base."""
        return next((model for name, model in self.models.items() if name != "base"), self.base)

    @property
    def base(self) -> ModelReference:
        """The base model, or the first."""
        return next(iter(self.models.values()))


def read_any(path: str | Path) -> MergeRecipe | PlainMerge:
    """What a merge by any method is made of; RainError as `read_recipe`, or if it lists no models.

    path: a configuration, or the `mergekit_config.yml` of a merged model's folder.
    """
    text, source = read_text(path), str(path)
    content = parse_yaml(text, source)
    if content.get("merge_method") in (RAIN, REGMEAN):
        return parse_recipe(text, source)
    return _plain(content, merge_configuration(content, source), source)


def _plain(content: Mapping[str, Any], merge: MergeConfiguration, source: str) -> PlainMerge:
    listed, parameters = _listed(content, merge, source)
    others = [(model, own) for model, own in listed if model != merge.base_model]
    if not others:
        raise _not_described(merge, source)
    named = {f"model {number}": pair for number, pair in enumerate(others, start=1)}
    base = {} if merge.base_model is None else {"base": merge.base_model}
    return PlainMerge(
        method=merge.merge_method,
        models={**base, **{name: model for name, (model, _) in named.items()}},
        own={name: own for name, (_, own) in named.items()},
        parameters=parameters,
    )


def _listed(
    content: Mapping[str, Any], merge: MergeConfiguration, source: str
) -> tuple[Sequence[tuple[ModelReference, Mapping[str, Any]]], Mapping[str, Any]]:
    """The models with their parameters, and the parameters of all: as written, if in `models:`.

    mergekit writes merges of `mergekit-multi` as one module with slices of layers.
    """
    parameters = content.get("parameters") or {}
    if merge.models:
        written = [one.get("parameters") or {} for one in content["models"]]
        return list(zip([one.model for one in merge.models], written, strict=True)), parameters
    try:
        listed = listed_models(merge, source)
    except RainError:
        raise _not_described(merge, source) from None
    pairs = [(one.model, one.parameters or {}) for one in listed.models]
    return pairs, {**parameters, **listed.own_parameters}


def _not_described(merge: MergeConfiguration, source: str) -> RainError:
    return RainError(
        f"{source}: merge_method is {shown(merge.merge_method)}: only merges that list whole "
        "models under `models:`, or in slices that leave every layer in its place, can be described"
    )
