"""Warn if the models' names suggest that their roles are swapped; names prove nothing."""

from __future__ import annotations

import re

from mergekit.common import ModelReference

# As publishers mark what was tuned to follow instructions: `Qwen2.5-7B-Instruct`, `gemma-2-9b-it`.
_TUNED = re.compile(r"(?:^|[-_. ])(instruct|chat|it|sft|dpo|rlhf)(?=$|[-_. \d])", re.IGNORECASE)


def swapped_hint(instruct: ModelReference, pretrained: ModelReference) -> str | None:
    """A warning where the pretrained model's name is an instruct model's and the other's is not."""
    marked = _mark(pretrained)
    if marked is None or _mark(instruct) is not None:
        return None
    return (
        f"the model with role pretrained is called {marked!r}: {pretrained}. Δ is instruct minus "
        "pretrained; if the two are swapped, the merge takes away what it should add"
    )


def _mark(model: ModelReference) -> str | None:
    """The word in the model's name that marks a tuned model; parent folders do not count."""
    path = model.lora if model.lora is not None else model.model
    parts = str(path.path).rstrip("/").split("/")
    name = parts[-1]
    if len(parts) > 2 and parts[-2] == "snapshots":  # of the hub's cache: a commit, not a name
        name = parts[-3].rpartition("--")[2]
    found = _TUNED.search(name)
    return None if found is None else found[1]
