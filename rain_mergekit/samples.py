"""The samples of both calibration sets, checked field by field (text only)."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import RainError
from .reading import JsonObject

_KINDS = {bool: "true or false", float: "a number", list: "a list", str: "a string"}


@dataclass(frozen=True)
class ReasoningSample:
    """One reasoning sample: verbatim ``output``, or ``reasoning`` and perhaps a ``response``.

    ``source`` is ``file:line`` (JSON lines) or ``file[index]`` (JSON list).
    """

    source: str
    prompt: str
    output: str | None
    reasoning: str | None
    response: str | None


@dataclass(frozen=True)
class InstructionSpec:
    """One instruction of a prompt, as verbatim substrings of the prompt and of the response."""

    instruction_id: str
    prompt_spans: tuple[str, ...]
    response_spans: tuple[str, ...]
    unrelated_response_spans: tuple[str, ...]


@dataclass(frozen=True)
class InstructionSample:
    """One instruction sample: verbatim ``output``, or ``reasoning`` and ``response``."""

    source: str
    prompt: str
    output: str | None
    reasoning: str | None
    response: str | None
    instructions: tuple[InstructionSpec, ...]
    unrelated_response_spans: tuple[str, ...]


class Fields:
    """Typed access to the fields of one JSON object; every complaint names place and field."""

    def __init__(self, source: str, value: object, path: str = "") -> None:
        self.source, self.path = source, path
        if not isinstance(value, JsonObject):
            what = f"field '{path}'" if path else "a sample"
            raise RainError(f"{source}: {what} must be a JSON object, found {_kind(value)}.")
        self._value = value

    def _get(self, name: str) -> tuple[str, object]:
        label = f"{self.path}.{name}" if self.path else name
        if name in self._value.repeated:
            raise RainError(f"{self.source}: field '{label}' is given twice; keep one of them.")
        return label, self._value.get(name)

    def value(self, name: str) -> object:
        """The value of any kind, or None if it is absent."""
        return self._get(name)[1]

    def text(self, name: str) -> str | None:
        """The string, or None if it is absent, null or blank."""
        label, value = self._get(name)
        return None if value is None else _text(self.source, label, value) or None

    def required(self, name: str, remedy: str = "every sample needs this text") -> str:
        """The string; RainError with the remedy if there is none."""
        text = self.text(name)
        if text is None:
            label, _ = self._get(name)
            raise RainError(f"{self.source}: field '{label}' is missing or blank: {remedy}.")
        return text

    def items(self, name: str, *, optional: bool = False) -> list[tuple[str, object]]:
        """The list's items, each with the label that names it in messages."""
        label, value = self._get(name)
        if value is None and optional:
            return []
        if not isinstance(value, list):
            found = "nothing" if value is None else _kind(value)
            raise RainError(f"{self.source}: field '{label}' must be a list, found {found}.")
        return [(f"{label}[{index}]", item) for index, item in enumerate(value)]

    def spans(self, name: str, *, optional: bool = False) -> tuple[str, ...]:
        """A list of texts that are not blank."""
        spans = []
        for label, item in self.items(name, optional=optional):
            span = _text(self.source, label, item)
            if not span:
                raise RainError(f"{self.source}: field '{label}' is blank; remove that span.")
            spans.append(span)
        return tuple(spans)


def _kind(value: object) -> str:
    return "null" if value is None else _KINDS.get(type(value), "an object")


def _text(source: str, label: str, value: object) -> str:
    """The string as it is, or "" if it is only white space."""
    if not isinstance(value, str):
        raise RainError(f"{source}: field '{label}' must be a string, found {_kind(value)}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as exc:  # "\ud800" is valid JSON, but no tokenizer takes it
        raise RainError(
            f"{source}: field '{label}' has half of a surrogate pair at character {exc.start}; "
            "write the whole character."
        ) from exc
    return value if value.strip() else ""


def parse_reasoning(source: str, value: object) -> ReasoningSample:
    """Check one JSON value as a reasoning sample; RainError names ``source`` and the field."""
    fields = Fields(source, value)
    prompt = fields.required("prompt")
    output, reasoning = fields.text("output"), _reasoning(fields)
    if output is None and reasoning is None:
        fields.required("reasoning", "give 'output', or 'reasoning' and 'response'")
    return ReasoningSample(source, prompt, output, reasoning, fields.text("response"))


def parse_instruction(source: str, value: object) -> InstructionSample:
    """Check one JSON value as an instruction sample; RainError names ``source`` and the field."""
    fields = Fields(source, value)
    prompt, output = fields.required("prompt"), fields.text("output")
    reasoning, response = _reasoning(fields), fields.text("response")
    if output is None:
        remedy = "give 'output', or 'reason' and 'response'"
        reasoning = reasoning or fields.required("reason", remedy)
        response = response or fields.required("response", remedy)
    specs = tuple(_spec(source, *item) for item in fields.items("related_prompt_list"))
    shared = fields.spans("unrelated_response_spans", optional=True)
    return InstructionSample(source, prompt, output, reasoning, response, specs, shared)


def _reasoning(fields: Fields) -> str | None:
    """The thinking text, under either of the names that published sets use."""
    texts = {text for name in ("reasoning", "reason") if (text := fields.text(name)) is not None}
    if len(texts) > 1:
        raise RainError(
            f"{fields.source}: fields 'reasoning' and 'reason' both hold a text, and they differ; "
            "keep one of them."
        )
    return texts.pop() if texts else None


def _spec(source: str, label: str, value: object) -> InstructionSpec:
    fields = Fields(source, value, label)
    return InstructionSpec(
        instruction_id=fields.text("instruction_id") or label,
        prompt_spans=fields.spans("prompt_spans"),
        response_spans=fields.spans("response_spans"),
        unrelated_response_spans=fields.spans("unrelated_response_spans", optional=True),
    )
