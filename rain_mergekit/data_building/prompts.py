"""Prompts for a reasoning set: one a line, or JSON with a domain."""

from __future__ import annotations

import os
from dataclasses import dataclass

from rain_mergekit.errors import RainError
from rain_mergekit.system.json_fields import Fields
from rain_mergekit.system.json_samples import StrPath, read_samples, read_text


@dataclass(frozen=True)
class Prompt:
    """What to ask; `domain` groups prompts for balancing, "" where none is given."""

    text: str
    domain: str


def read_prompts(path: StrPath) -> list[Prompt]:
    """Prompts of a text file (`.txt`, one a line) or of JSON or JSON lines; each text once.

    Raises RainError naming file, line and field.
    """
    if os.fspath(path).lower().endswith(".txt"):
        lines = (line.strip() for line in read_text(path).split("\n"))
        found = [Prompt(line, "") for line in lines if line]
        if not found:
            raise RainError(f"{path}: the file holds no prompts.")
    else:
        found = read_samples(path, _parse)[1]
    return list({prompt.text: prompt for prompt in reversed(found)}.values())[::-1]


def _parse(source: str, value: object) -> Prompt:
    fields = Fields(source, value)
    return Prompt(
        fields.required("prompt", "every line needs a prompt"), fields.text("domain") or ""
    )
