"""Prompts for a reasoning set: one a line, JSON with a domain, or an instruction set's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from rain_mergekit.errors import RainError
from rain_mergekit.system.evenly_spaced import evenly_spaced
from rain_mergekit.system.json_fields import JsonFields
from rain_mergekit.system.json_samples import StrPath, read_samples, read_text
from rain_mergekit.system.shipped_files import shipped

CONSTRAINED = "constrained"  # the domain of prompts with instructions that a rule can check
_INSTRUCTIONS = "related_prompt_list", "instruction_id_list"  # as in a set, and in IFEval's file


@dataclass(frozen=True)
class Prompt:
    """What to ask; `domain` groups prompts for balancing, "" where none is given."""

    text: str
    domain: str


def gather_prompts(paths: Sequence[StrPath]) -> list[Prompt]:
    """The prompts of all files in order, each text once; without files `packaged_prompts()`.

    Raises RainError naming file, line and field.
    """
    if not paths:
        return packaged_prompts()
    return _distinct([prompt for path in paths for prompt in read_prompts(path)])


def packaged_prompts() -> list[Prompt]:
    """The prompts of the package's reasoning set, and as many with constraints, evenly spaced.

    A reasoning model must be seen to start thinking on both.
    """
    plain, asked = (
        read_prompts(shipped("calibration") / f"{name}.jsonl")
        for name in ("reasoning", "instruction")
    )
    return _distinct([*plain, *evenly_spaced(asked, len(plain))])


def read_prompts(path: StrPath) -> list[Prompt]:
    """Prompts of a text file (`.txt`, one a line) or of JSON or JSON lines; each text once.

    Prompts with instructions and no `domain` of their own are of the domain CONSTRAINED.
    Raises RainError naming file, line and field.
    """
    if os.fspath(path).lower().endswith(".txt"):
        lines = (line.strip() for line in read_text(path).split("\n"))
        found = [Prompt(line, "") for line in lines if line]
        if not found:
            raise RainError(f"{path}: the file holds no prompts.")
    else:
        found = read_samples(path, _parse)[1]
    return _distinct(found)


def _distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Each text once, where it came first."""
    return list({prompt.text: prompt for prompt in reversed(prompts)}.values())[::-1]


def _parse(source: str, value: object) -> Prompt:
    fields = JsonFields(source, value)
    text = fields.required("prompt", "every line needs a prompt")
    constrained = any(fields.value(name) for name in _INSTRUCTIONS)
    return Prompt(text, fields.text("domain") or (CONSTRAINED if constrained else ""))
