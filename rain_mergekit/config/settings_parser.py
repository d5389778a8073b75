"""Read the `rain:` section: validate it, and name each field that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from rain_mergekit.config.setting_types import MarkerSettings, RegMeanSettings, StreamWeights
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.errors import RainError
from rain_mergekit.system.untrusted_input import shown
from rain_mergekit.system.wording import did_you_mean

_PROBLEMS, _NAME = 10, 80  # what a message names, and how much of a name


def parse_settings(section: object, source: str) -> RainSettings:
    """Validate the `rain:` section; RainError names the file, each field and what was expected."""
    if not isinstance(section, Mapping):
        raise RainError(
            f"{source}: the `rain:` section is missing; add one with at least "
            "`reasoning_data` and `instruction_data` (`mergekit-rain examples` writes "
            "configs/reference.yml, which has all of them; mergekit-multi leaves it out of what it "
            "writes)"
        )
    try:
        return RainSettings.model_validate(dict(section))
    except ValidationError as error:
        lines = [_describe(item) for item in error.errors()[:_PROBLEMS]]
        raise RainError(f"{source}: rain: " + "; ".join(lines)) from None


_SECTIONS: Mapping[str, type[BaseModel]] = {
    "stream_weights": StreamWeights,
    "regmean": RegMeanSettings,
}


def _describe(item: Mapping[str, Any]) -> str:
    parts = [str(part) for part in item["loc"] if part not in ("auto", "pairs")]
    field = ".".join(parts)
    if item["type"] == "extra_forbidden":
        model = _SECTIONS.get(parts[0], MarkerSettings) if len(parts) > 1 else RainSettings
        meant = did_you_mean(parts[-1], model.model_fields)
        known = ", ".join(model.model_fields)
        return f"unknown setting {shown(field)}{meant} (known: {known})"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{field[:_NAME]}: {message}, got {shown(item['input'])}" if field else message
