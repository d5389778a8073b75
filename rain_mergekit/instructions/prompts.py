"""Prompts with the instructions in them, in IFEval's layout or in that of an instruction set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rain_mergekit.errors import RainError
from rain_mergekit.instructions.answer_key import AnswerKey, read_key
from rain_mergekit.system.json_fields import JsonFields
from rain_mergekit.system.json_samples import StrPath, read_samples

# Before a rule's id: the instruction is about the thinking, not about the response.
THINKING = "thinking:"


@dataclass(frozen=True)
class Instruction:
    """The rule's id, its arguments, and its text in the prompt where that is given.

    kind: the id, after `thinking:` where the thinking must follow it. label: names it in messages.
    """

    kind: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    spans: tuple[str, ...] = ()
    label: str = "kwargs"

    @property
    def binds_thinking(self) -> bool:
        """Whether it is about the thinking."""
        return self.kind.startswith(THINKING)

    @property
    def rule(self) -> str:
        """The id of its rule."""
        return self.kind.removeprefix(THINKING)


@dataclass(frozen=True)
class Asked:
    """One prompt, its instructions, often none, and what is right, where that is known.

    kind: groups prompts in tables, "" where none is given.
    """

    source: str
    text: str
    instructions: tuple[Instruction, ...] = ()
    key: AnswerKey | None = None
    kind: str = ""

    def record(self) -> dict[str, Any]:
        """The prompt as a JSON object, which `parse_prompt` reads."""
        found: dict[str, Any] = {"prompt": self.text}
        if self.kind:
            found["kind"] = self.kind
        if self.key is not None:
            parts = self.key.parts
            found["answer"] = parts[0] if len(parts) == 1 else list(parts)
            if self.key.choices:
                found["choices"] = list(self.key.choices)
        if self.instructions:
            found["instruction_id_list"] = [item.kind for item in self.instructions]
            found["kwargs"] = [dict(item.kwargs) for item in self.instructions]
        return found


def read_prompts(path: StrPath) -> list[Asked]:
    """Prompts from JSON or JSON lines, in either layout.

    `{prompt, instruction_id_list, kwargs}` as in IFEval's file, or
    `{prompt, related_prompt_list: [{instruction_id, kwargs, prompt_spans}]}` as in an instruction
    set; with `kind`, `answer` and `choices` or without. Raises RainError naming file, line and
    field.
    """
    return read_samples(path, lambda source, value: parse_prompt(JsonFields(source, value)))[1]


def parse_prompt(fields: JsonFields) -> Asked:
    """One prompt from the fields of its object."""
    source = fields.source
    prompt = fields.required("prompt", "every line needs a prompt")
    ours = fields.value("related_prompt_list") is not None
    found = _related(fields, source) if ours else _listed(fields, source)
    kind = fields.text("kind") or ""
    return Asked(source, prompt, tuple(found), read_key(fields), kind)


def _related(fields: JsonFields, source: str) -> Iterator[Instruction]:
    for label, item in fields.items("related_prompt_list"):
        entry = JsonFields(source, item, label)
        kind = entry.required("instruction_id", "it names the rule")
        given = entry.value("kwargs")
        spans = entry.spans("prompt_spans", optional=True)
        yield Instruction(kind, _arguments(source, f"{label}.kwargs", given), spans, label)


def _listed(fields: JsonFields, source: str) -> Iterator[Instruction]:
    kinds = fields.spans("instruction_id_list", optional=True)
    given = fields.value("kwargs")
    given = [None] * len(kinds) if given is None else given
    if not isinstance(given, list) or len(given) != len(kinds):
        raise RainError(f"{source}: `kwargs` must be a list with one object for each instruction")
    for index, (kind, value) in enumerate(zip(kinds, given, strict=True)):
        label = f"kwargs[{index}]"
        yield Instruction(kind, _arguments(source, label, value), (), label)


def _arguments(source: str, label: str, value: object) -> dict[str, Any]:
    """Without those that are null, as in files with a column for every rule's arguments."""
    given = {} if value is None else JsonFields(source, value, label).raw
    found = {name: value for name, value in given.items() if value is not None}
    # 3.0, as tables are exported, is 3: the rules count with integers.
    return {n: int(v) if isinstance(v, float) and v.is_integer() else v for n, v in found.items()}
