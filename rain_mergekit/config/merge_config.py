"""The one YAML file that drives both steps: mergekit's part, read by mergekit, and ours."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml
from mergekit.common import ModelReference
from mergekit.config import InputModelDefinition, MergeConfiguration
from pydantic import ValidationError

from rain_mergekit.config.listed_models import listed_models
from rain_mergekit.config.merge_parameters import TYPE_FIELDS, check_merge
from rain_mergekit.config.method_names import AIM, CALIBRATED, REGMEAN
from rain_mergekit.config.methods import aim_models, settings_for
from rain_mergekit.config.presets import expanded
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.config.settings_parser import parse_settings
from rain_mergekit.config.type_names import type_name
from rain_mergekit.errors import RainError
from rain_mergekit.system.untrusted_input import (
    load_yaml,
    read_regular,
    shortened,
    shown,
)

ROLES = ("instruct", "pretrained")


@dataclass(frozen=True)
class MergeRecipe:
    """What a merge is made of: the three models by role, and where the calibration lies.

    text: the file's text. content: what it says, as plain values. merge: mergekit's part of it.
    tokenizer: whether mergekit is told to align the vocabularies. layers: how many `slices:` have,
    None without. slice_strengths: the `lambda` of those that have their own.
    """

    path: str
    text: str
    content: Mapping[str, Any]
    merge: MergeConfiguration
    reasoning: ModelReference
    instruct: ModelReference
    pretrained: ModelReference
    calibration: Path
    tokenizer: bool
    layers: int | None
    slice_strengths: Mapping[str, Any]

    @property
    def models(self) -> dict[str, ModelReference]:
        """The three references by role."""
        return {
            "reasoning": self.reasoning,
            "instruct": self.instruct,
            "pretrained": self.pretrained,
        }

    @property
    def method(self) -> str:
        """The merge method, one of those that apply a calibration file."""
        return str(self.merge.merge_method)

    @property
    def main(self) -> ModelReference:
        """The reasoning model, of which the result is a version."""
        return self.reasoning

    @property
    def strength(self) -> Any:
        """`parameters.lambda` as it is written: a number, a gradient, or a list of filters.

        Where slices have a `lambda` of their own: a mapping of these, and of "otherwise" to the
        rest.
        """
        value = (self.content.get("parameters") or {}).get("lambda", 1.0)
        return {**self.slice_strengths, "otherwise": value} if self.slice_strengths else value

    @property
    def one_strength(self) -> float:
        """`parameters.lambda` where it is one number; RainError elsewhere."""
        value = self.strength
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RainError(f"{self.path}: lambda is {value!r}, not one number")
        return float(value)


@dataclass(frozen=True)
class RainConfig(MergeRecipe):
    """A whole configuration: what a merge is made of, and the settings of its calibration."""

    settings: RainSettings

    def with_strength(self, strength: float) -> RainConfig:
        """A copy with `parameters.lambda` as one number, whatever it was."""
        parameters = {**(self.content.get("parameters") or {}), "lambda": strength}
        content = {**self.content, "parameters": parameters}
        return replace(
            self,
            text=yaml.safe_dump(content, sort_keys=False, allow_unicode=True),
            content=content,
            merge=self.merge.model_copy(
                update={"parameters": {**(self.merge.parameters or {}), "lambda": strength}}
            ),
        )


def read_config(path: str | Path) -> RainConfig:
    """Read and validate; RainError names the file, the field, what was expected and what to do."""
    return parse_config(read_text(path), str(path))


def parse_config(text: str, source: str) -> RainConfig:
    """Read and validate a configuration's text; messages call it by `source`."""
    recipe = parse_recipe(text, source)
    if recipe.slice_strengths:
        raise RainError(
            f"{source}: lambda is given for {next(iter(recipe.slice_strengths))}: give it under "
            "the configuration's own parameters, where it may be a gradient over the layers"
        )
    given = parse_settings(recipe.content.get("rain"), source)
    settings = settings_for(recipe.method, given, source)
    return RainConfig(
        **{f.name: getattr(recipe, f.name) for f in fields(recipe)}, settings=settings
    )


def read_recipe(folder: str | os.PathLike[str]) -> MergeRecipe:
    """What mergekit has left in a merged model's folder; `rain:` is not in it after mergekit-multi.

    RainError names the file, and what of it cannot be read.
    """
    path = Path(folder, "mergekit_config.yml")
    return parse_recipe(read_text(path), str(path))


def parse_recipe(text: str, source: str) -> MergeRecipe:
    """What a merge is made of, from the text of a configuration; messages call it by `source`."""
    data = parse_yaml(text, source)
    merge = merge_configuration(data, source)
    if merge.merge_method not in CALIBRATED:
        raise RainError(
            f"{source}: merge_method is {shown(merge.merge_method)}, expected 'rain' or another "
            f"that applies a calibration ({', '.join(CALIBRATED)})"
        )
    if merge.base_model is None:
        raise RainError(f"{source}: base_model is missing: name the reasoning model there")
    listed = listed_models(merge, source)
    check_merge(merge, listed, source)
    # The base model may be listed without a role, as mergekit allows; with one it is a proxy.
    others = [
        model
        for model in listed.models
        if model.model != merge.base_model or "role" in (model.parameters or {})
    ]
    if merge.merge_method == AIM:
        roles = aim_models(others, merge.base_model, source)
    else:
        alone = _may_be_alone(merge.merge_method, data.get("rain"))
        own = _roles(others, merge.base_model, source, alone=alone)
        roles = {"reasoning": merge.base_model, **own}
    return MergeRecipe(
        path=source,
        text=text,
        content=data,
        merge=merge,
        reasoning=roles["reasoning"],
        instruct=roles["instruct"],
        pretrained=roles["pretrained"],
        calibration=_calibration_path(merge, source),
        tokenizer=merge.tokenizer is not None or merge.tokenizer_source is not None,
        layers=listed.layers,
        slice_strengths=listed.strengths,
    )


def _may_be_alone(method: str, section: object) -> bool:
    """Whether the instruct model may be listed without a pretrained one.

    Without a `rain:` section the fit is not known; it is missing only from merges already made.
    """
    whole = expanded(section)
    given = whole if isinstance(whole, Mapping) else {"fit": None}
    free = given.get("fit", "streams") == "streams" or given.get("gamma") == 1
    return section is None or method == REGMEAN or free


def read_text(path: str | Path) -> str:
    """A configuration's text; RainError if it cannot be read."""
    try:
        return read_regular(path).decode("utf-8")
    except (OSError, ValueError) as error:
        raise RainError(f"{path}: cannot read the configuration: {error}") from None


def parse_yaml(text: str, source: str) -> Mapping[str, Any]:
    """Its content as plain values; RainError with line and column if it is no mapping."""
    try:
        data = load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if getattr(error, "context", None) == "expected a single document in the stream":
            raise RainError(
                f"{source}: holds several documents, which mergekit-multi merges one by one; for "
                "this command put the one with merge_method rain into a file of its own: the "
                "calibration is the same"
            ) from None
        raise RainError(f"{source}: not valid YAML: {shortened(str(error))}") from None
    if not isinstance(data, dict):
        raise RainError(f"{source}: expected a mapping with merge_method, base_model, models, rain")
    return data


def with_type_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with `dtype` and `out_dtype` as mergekit spells them (`bfloat16`)."""
    spelled = {key: type_name(data[key]) for key in TYPE_FIELDS if isinstance(data.get(key), str)}
    return {**data, **spelled}


def merge_configuration(data: Mapping[str, Any], source: str) -> MergeConfiguration:
    """Mergekit's part; RainError says what mergekit cannot read."""
    try:
        return MergeConfiguration.model_validate(with_type_names(data))
    except ValidationError as error:
        items = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5]]
        raise RainError(
            f"{source}: mergekit cannot read this: {shortened('; '.join(items))}"
        ) from None
    except RuntimeError as error:  # mergekit's own validators
        raise RainError(f"{source}: mergekit cannot read this: {shortened(str(error))}") from None


def _roles(
    models: Sequence[InputModelDefinition], base: ModelReference, source: str, *, alone: bool
) -> dict[str, ModelReference]:
    """The models by role. alone: the instruct model may come without a pretrained one.

    The reasoning model stands for the pretrained one then.
    """
    if alone and len(models) == 1 and (models[0].parameters or {}).get("role") != "pretrained":
        return {"instruct": models[0].model, "pretrained": base}
    if len(models) != 2:
        raise _wrong_count(source, len(models), alone=alone)
    found: dict[str, ModelReference] = {}
    for item in models:
        role = (item.parameters or {}).get("role")
        if role not in ROLES:
            raise RainError(
                f"{source}: models: {item.model}: parameters.role is {shown(role)}, expected "
                "'instruct' or 'pretrained'"
            )
        if role == "instruct" and item.model == base:
            raise RainError(
                f"{source}: models: {item.model}: base_model cannot have role instruct: there "
                "would be nothing to merge into it; it can stand for the pretrained model only"
            )
        if role in found:
            raise RainError(
                f"{source}: models: role {role!r} is given twice ({found[str(role)]} and "
                f"{item.model}); one model is 'instruct', the other 'pretrained'"
            )
        found[str(role)] = item.model
    return found


def _wrong_count(source: str, found: int, *, alone: bool) -> RainError:
    if alone:
        return RainError(
            f"{source}: models: expected the instruct model, and the pretrained one if there is "
            f"one, besides base_model; found {found}"
        )
    missed = ": fit: projection with gamma below 1 subtracts the pretrained model; list it, or set"
    return RainError(
        f"{source}: models: expected exactly two besides base_model (role instruct and role "
        f"pretrained), found {found}{f'{missed} gamma: 1' if found == 1 else ''}"
    )


def _calibration_path(merge: MergeConfiguration, source: str) -> Path:
    value = (merge.parameters or {}).get("calibration")
    if not isinstance(value, str) or not value:
        raise RainError(
            f"{source}: parameters.calibration is {shown(value)}, expected the path of the "
            "calibration file (`mergekit-rain calibrate` writes it, the merge reads it)"
        )
    if value.startswith("~"):
        raise RainError(
            f"{source}: parameters.calibration is {shown(value)}: mergekit takes `~` for the name "
            "of a folder; write the whole path"
        )
    return Path(value)
