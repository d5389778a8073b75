"""The YAML that `mergekit-rain auto` writes: the same merge again, by the other commands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rain_mergekit.auto.candidates import Candidate
from rain_mergekit.auto.request import Request
from rain_mergekit.checks.vocabulary_sizes import different_vocabularies
from rain_mergekit.models.loading import read_model_config

_HEAD = "# Written by `mergekit-rain auto`. The same again: mergekit-rain merge THIS-FILE OUT\n"
_TYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Places:
    """Paths that the YAML names."""

    calibration: Path
    reasoning: Path
    instruction: Path


def configuration(
    roles: Mapping[str, Candidate], names: Mapping[str, str], places: Places, request: Request
) -> str:
    """The text. names: references of the models by role.

    RainError if a model's config cannot be read.
    """
    reasoning = roles["reasoning"].checkpoint
    content: dict[str, Any] = {
        "merge_method": "rain",
        "base_model": names["reasoning"],
        "models": [
            {"model": names[role], "parameters": {"role": role}}
            for role in roles
            if role != "reasoning"
        ],
        "parameters": {"calibration": str(places.calibration), "lambda": request.strength},
        "dtype": stored_type(reasoning.types(reasoning.names)),
    }
    checkpoints = {role: one.checkpoint for role, one in roles.items()}
    if different_vocabularies(checkpoints, read_model_config(reasoning)):
        content["tokenizer"] = {"source": "base"}
    content["rain"] = _section(places, request)
    return _HEAD + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _section(places: Places, request: Request) -> dict[str, Any]:
    section: dict[str, Any] = {
        "fit": request.fit,
        "reasoning_data": str(places.reasoning),
        "instruction_data": str(places.instruction),
    }
    if request.markers:
        section["markers"] = [{"open": one, "close": other} for one, other in request.markers]
    if request.blocks != "required":
        section["blocks"] = request.blocks
    if request.chat_template_kwargs:
        section["chat_template_kwargs"] = dict(request.chat_template_kwargs)
    return section


def stored_type(types: Mapping[str, str]) -> str:
    """The type in which most of the tensors are stored, as mergekit spells it."""
    stored = list(types.values())
    known = [name for name in _TYPES if name in stored]
    return _TYPES[max(known, key=stored.count)] if known else "bfloat16"
