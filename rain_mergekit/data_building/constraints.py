"""Prompts with instructions that a rule can check, and the samples made from answers to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rain_mergekit.data_building.judge import DroppedError, Kept
from rain_mergekit.data_building.marking import prompt_spans, response_spans
from rain_mergekit.errors import RainError
from rain_mergekit.instructions.prompts import Asked, Instruction, read_prompts
from rain_mergekit.instructions.rules import check_rules, follows
from rain_mergekit.system.json_samples import StrPath


@dataclass(frozen=True)
class Constrained:
    """Prompts, each with at least one instruction whose text in it is known; and those left out.

    left_out: where each stands, and why it cannot be used.
    """

    prompts: tuple[Asked, ...]
    left_out: tuple[tuple[str, str], ...]


def read_constrained(*paths: StrPath) -> Constrained:
    """Read files of prompts in either layout, each text once.

    Missing `prompt_spans` are found by rule. Raises RainError naming file, line and
    field, and if no prompt is left.
    """
    asked = [prompt for path in paths for prompt in read_prompts(path)]
    check_rules(asked)
    found: dict[str, Asked] = {}
    left_out: list[tuple[str, str]] = []
    for prompt in asked:
        located = [_located(prompt, instruction) for instruction in prompt.instructions]
        missing = [item.kind for item in located if not (item.spans or item.binds_thinking)]
        if missing:
            reason = f"no sentence of the prompt was found that gives {', '.join(missing)}"
            left_out.append((prompt.source, f"{reason}; name it in `prompt_spans`"))
        elif any(item.binds_thinking for item in located):
            left_out.append((prompt.source, "it has an instruction for the thinking"))
        elif not located:
            left_out.append((prompt.source, "it names no instruction"))
        else:
            found.setdefault(prompt.text, replace(prompt, instructions=tuple(located)))
    if not found:
        source, reason = left_out[0]
        raise RainError(
            f"{', '.join(map(str, paths))}: none of its prompts can be used ({source}: {reason})"
        )
    return Constrained(tuple(found.values()), tuple(left_out))


def make_sample(prompt: Asked, kept: Kept) -> dict[str, Any]:
    """The sample of an answer that follows every instruction, with its spans.

    Raises DroppedError naming the kind that is not followed.
    """
    followed = follows(prompt, kept.response)
    for item, good in zip(prompt.instructions, followed, strict=True):
        if not good:
            raise DroppedError(f"does not follow {item.kind}")
    related = [_related(item, kept.response) for item in prompt.instructions]
    return {"prompt": prompt.text, **kept.fields, "related_prompt_list": related}


def _related(item: Instruction, response: str) -> dict[str, Any]:
    satisfying, unrelated = response_spans(item.kind, item.kwargs, response)
    return {
        "instruction_id": item.kind,
        "kwargs": dict(item.kwargs),
        "prompt_spans": list(item.spans),
        "response_spans": satisfying,
        "unrelated_response_spans": unrelated,
    }


def _located(prompt: Asked, item: Instruction) -> Instruction:
    """The instruction with its text in the prompt, if there is one."""
    missing = [span for span in item.spans if span not in prompt.text]
    if missing:
        raise RainError(
            f"{prompt.source}: field '{item.label}.prompt_spans' has a text that is not in the "
            f"prompt: {missing[0]!r}; spans are verbatim"
        )
    spans = item.spans or tuple(prompt_spans(item.kind, item.kwargs, prompt.text))
    return replace(item, spans=spans)
