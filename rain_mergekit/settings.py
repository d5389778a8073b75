"""The `rain:` section of the YAML: every setting, its default and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from rain_mergekit.errors import RainError

Share = Annotated[float, Field(gt=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0)]


def _yaml_off(value: object) -> object:
    """YAML 1.1 reads a bare `off` as false; it means the word here."""
    return "off" if value is False else value


class MarkerSettings(BaseModel):
    """The strings that open and close the thinking block."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    open: Annotated[str, Field(min_length=1)] = "<think>"
    close: Annotated[str, Field(min_length=1)] = "</think>"


class RainSettings(BaseModel):
    """What `mergekit-rain calibrate` does; the same names as in the YAML's `rain:` section."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reasoning_data: str
    instruction_data: str | None = None
    markers: MarkerSettings = MarkerSettings()
    window: Annotated[int, Field(ge=0)] = 5
    max_tokens: PositiveInt | None = None

    projection: Literal["oblique", "orthogonal"] = "oblique"
    rank_by: Literal["response_energy", "energy", "tolerance", "count", "full"] = "response_energy"
    rank_share: Share = 0.99
    rank_tolerance: Annotated[float, Field(ge=0.0, lt=1.0)] = 1e-3
    rank_count: PositiveInt | None = None
    max_rank: PositiveInt | None = None
    size_budget: Share = 0.10
    epsilon: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 0.1
    ridge: NonNegative = 0.0
    instruction_rows: PositiveInt = 4096

    protect_thinking: NonNegative = 1.0
    protect_response: NonNegative = 0.0
    content_rows: PositiveInt = 2048

    coefficients: Annotated[
        Literal["off", "normalized", "closed_form"], BeforeValidator(_yaml_off)
    ] = "off"
    rho: NonNegative = 1.0
    alpha_min: NonNegative = 0.5
    alpha_max: NonNegative = 1.5
    leakage_from_thinking: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> RainSettings:
        if self.rank_by == "count" and self.rank_count is None:
            raise ValueError("rank_by: count needs `rank_count` (how many directions to protect)")
        if self.alpha_min > self.alpha_max:
            raise ValueError("alpha_min must not be above alpha_max")
        if self.needs_instruction_data and self.instruction_data is None:
            raise ValueError(
                "instruction_data is missing: the oblique projection and the coefficients are "
                "measured on it (or set projection: orthogonal and coefficients: off)"
            )
        return self

    @property
    def needs_instruction_data(self) -> bool:
        """Whether anything is measured on the instruction set."""
        return self.projection == "oblique" or self.coefficients != "off"


def parse_settings(section: object, source: str) -> RainSettings:
    """Validate the `rain:` section; RainError names the file, each field and what was expected."""
    if not isinstance(section, Mapping):
        raise RainError(
            f"{source}: the `rain:` section is missing; add one with at least "
            "`reasoning_data` and `instruction_data` (see configs/reference.yml)"
        )
    try:
        return RainSettings.model_validate(dict(section))
    except ValidationError as error:
        lines = [_describe(item) for item in error.errors()]
        raise RainError(f"{source}: rain: " + "; ".join(lines)) from None


def _describe(item: Mapping[str, Any]) -> str:
    field = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = ", ".join(RainSettings.model_fields)
        return f"unknown setting {field!r} (known: {known})"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{field}: {message}, got {item['input']!r}" if field else message
