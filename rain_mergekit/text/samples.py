"""The samples of both calibration sets, checked field by field (text only)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rain_mergekit.errors import RainError
from rain_mergekit.system.json_fields import JsonFields
from rain_mergekit.text.conversation import Conversation, Message, parse_conversation


class _Asked:
    """The request, which both kinds of samples have."""

    prompt: str
    messages: tuple[Message, ...]
    before: tuple[Message, ...]

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The messages for the chat template, up to where the model's last turn begins."""
        own = self.messages or ({"role": "user", "content": self.prompt},)
        others = (i for i, one in enumerate(own) if one["role"] not in ("system", "developer"))
        head = next(others, len(own))
        return (*own[:head], *self.before, *own[head:])

    def is_lent(self, message: Message) -> bool:
        """Whether that message of the conversation is another sample's."""
        return any(message is one for one in self.before)


@dataclass(frozen=True)
class ReasoningSample(_Asked):
    """One reasoning sample: verbatim `output`, or `reasoning` and perhaps a `response`.

    `source` is `file:line` (JSON lines) or `file[index]` (JSON list). `messages` is empty
    where the sample has only a `prompt`. `before` is an earlier turn that another sample lends.
    """

    source: str
    prompt: str
    output: str | None
    reasoning: str | None
    response: str | None
    messages: tuple[Message, ...] = ()
    tools: tuple[Any, ...] = ()
    before: tuple[Message, ...] = ()


@dataclass(frozen=True)
class InstructionSpec:
    """One instruction of a prompt, as verbatim substrings of the prompt and of the response."""

    instruction_id: str
    prompt_spans: tuple[str, ...]
    response_spans: tuple[str, ...]
    unrelated_response_spans: tuple[str, ...]


@dataclass(frozen=True)
class InstructionSample(_Asked):
    """One instruction sample: verbatim `output`, or `reasoning` and `response`.

    `before` is an earlier turn that another sample lends.
    """

    source: str
    prompt: str
    output: str | None
    reasoning: str | None
    response: str | None
    instructions: tuple[InstructionSpec, ...]
    unrelated_response_spans: tuple[str, ...]
    messages: tuple[Message, ...] = ()
    tools: tuple[Any, ...] = ()
    before: tuple[Message, ...] = ()


def parse_reasoning(source: str, value: object) -> ReasoningSample:
    """Check one JSON value as a reasoning sample; RainError names `source` and the field."""
    fields = JsonFields(source, value)
    asked = parse_conversation(fields)
    output, reasoning, response = _said(fields, asked)
    if output is None and reasoning is None:
        fields.required("reasoning", "give 'output', or 'reasoning' and 'response'")
    return ReasoningSample(
        source, asked.prompt, output, reasoning, response, asked.messages, asked.tools
    )


def parse_instruction(
    source: str, value: object, *, spans_needed: bool = True
) -> InstructionSample:
    """Check one JSON value as an instruction sample; RainError names `source` and the field.

    Without `spans_needed` it may lack the list of its instructions.
    """
    fields = JsonFields(source, value)
    asked = parse_conversation(fields)
    output, reasoning, response = _said(fields, asked)
    if output is None:
        remedy = "give 'output', or 'reason' and 'response'"
        reasoning = reasoning or fields.required("reason", remedy)
        response = response or fields.required("response", remedy)
    return InstructionSample(
        source=source,
        prompt=asked.prompt,
        output=output,
        reasoning=reasoning,
        response=response,
        instructions=tuple(
            _spec(source, *item)
            for item in fields.items("related_prompt_list", optional=not spans_needed)
        ),
        unrelated_response_spans=fields.spans("unrelated_response_spans", optional=True),
        messages=asked.messages,
        tools=asked.tools,
    )


def _said(fields: JsonFields, asked: Conversation) -> tuple[str | None, str | None, str | None]:
    """Output, reasoning and response, from the sample or from its last message."""
    said = fields.text("output"), _reasoning(fields), fields.text("response")
    if asked.answer is None:
        return said
    if any(part is not None for part in said):
        raise RainError(
            f"{fields.source}: the model's last turn is given twice, as the last of 'messages' and "
            "beside them; keep one of them"
        )
    return asked.answer


def _reasoning(fields: JsonFields) -> str | None:
    """The thinking text, under either of the names that published sets use."""
    texts = {text for name in ("reasoning", "reason") if (text := fields.text(name)) is not None}
    if len(texts) > 1:
        raise RainError(
            f"{fields.source}: fields 'reasoning' and 'reason' both hold a text, and they differ; "
            "keep one of them"
        )
    return texts.pop() if texts else None


def _spec(source: str, label: str, value: object) -> InstructionSpec:
    fields = JsonFields(source, value, label)
    return InstructionSpec(
        instruction_id=fields.text("instruction_id") or label,
        prompt_spans=fields.spans("prompt_spans"),
        response_spans=fields.spans("response_spans"),
        unrelated_response_spans=fields.spans("unrelated_response_spans", optional=True),
    )
