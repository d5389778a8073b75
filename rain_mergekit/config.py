"""The one YAML file that drives both steps: mergekit's part, read by mergekit, and ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mergekit.common import ModelReference
from mergekit.config import InputModelDefinition, MergeConfiguration
from pydantic import ValidationError

from rain_mergekit.errors import RainError
from rain_mergekit.inputs import load_yaml, read_regular, shortened, shown
from rain_mergekit.merge_parameters import check_merge
from rain_mergekit.settings import RainSettings, parse_settings

ROLES = ("instruct", "pretrained")


@dataclass(frozen=True)
class RainConfig:
    """A parsed configuration: the three models by role, where the calibration lies, settings.

    tokenizer: whether mergekit is told to align the vocabularies.
    """

    path: str
    text: str
    reasoning: ModelReference
    instruct: ModelReference
    pretrained: ModelReference
    calibration: Path
    settings: RainSettings
    tokenizer: bool

    @property
    def models(self) -> dict[str, ModelReference]:
        """The three references by role."""
        return {
            "reasoning": self.reasoning,
            "instruct": self.instruct,
            "pretrained": self.pretrained,
        }


def read_config(path: str | Path) -> RainConfig:
    """Read and validate; RainError names the file, the field, what was expected and what to do."""
    source = str(path)
    text = _read_text(path)
    data = _parse_yaml(text, source)
    merge = _merge_configuration(data, source)
    if merge.merge_method != "rain":
        raise RainError(f"{source}: merge_method is {shown(merge.merge_method)}, expected 'rain'")
    check_merge(merge, source)
    if merge.base_model is None:
        raise RainError(f"{source}: base_model is missing: name the reasoning model there")
    if not merge.models:
        raise RainError(
            f"{source}: list the instruct and the pretrained model under `models:` "
            "(slices and modules are not supported by rain)"
        )
    # The base model may be listed without a role, as mergekit allows; with one it is a proxy.
    others = [
        model
        for model in merge.models
        if model.model != merge.base_model or "role" in (model.parameters or {})
    ]
    roles = _roles(others, merge.base_model, source)
    return RainConfig(
        path=source,
        text=text,
        reasoning=merge.base_model,
        instruct=roles["instruct"],
        pretrained=roles["pretrained"],
        calibration=_calibration_path(merge, source),
        settings=parse_settings(data.get("rain"), source),
        tokenizer=merge.tokenizer is not None or merge.tokenizer_source is not None,
    )


def _read_text(path: str | Path) -> str:
    try:
        return read_regular(path).decode("utf-8")
    except (OSError, ValueError) as error:
        raise RainError(f"{path}: cannot read the configuration: {error}") from None


def _parse_yaml(text: str, source: str) -> Mapping[str, Any]:
    try:
        data = load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RainError(f"{source}: not valid YAML: {shortened(str(error))}") from None
    if not isinstance(data, dict):
        raise RainError(f"{source}: expected a mapping with merge_method, base_model, models, rain")
    return data


def _merge_configuration(data: Mapping[str, Any], source: str) -> MergeConfiguration:
    try:
        return MergeConfiguration.model_validate(data)
    except ValidationError as error:
        items = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5]]
        raise RainError(
            f"{source}: mergekit cannot read this: {shortened('; '.join(items))}"
        ) from None
    except RuntimeError as error:  # mergekit's own validators
        raise RainError(f"{source}: mergekit cannot read this: {shortened(str(error))}") from None


def _roles(
    models: Sequence[InputModelDefinition], base: ModelReference, source: str
) -> dict[str, ModelReference]:
    if len(models) != 2:
        raise RainError(
            f"{source}: models: expected exactly two besides base_model (role instruct and role "
            f"pretrained), found {len(models)}"
        )
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
