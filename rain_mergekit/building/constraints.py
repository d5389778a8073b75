"""Prompts with instructions that a rule can check, and the samples made from answers to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rain_mergekit.building.judge import DroppedError, Kept
from rain_mergekit.building.marking import prompt_spans, response_spans
from rain_mergekit.building.rules import ARGUMENTS, LANGUAGES, RELATIONS, RULES, check
from rain_mergekit.errors import RainError
from rain_mergekit.fields import Fields
from rain_mergekit.reading import JsonObject, StrPath, read_samples

_LISTS = ("keywords", "forbidden", "keys", "headings", "columns")
_TEXTS = ("keyword", "phrase", "text", "marker", "language", "letter", "separator", "divider")
_CHOICES = {"relation": RELATIONS, "language": LANGUAGES}


@dataclass(frozen=True)
class Constraint:
    """One instruction: its kind, the arguments of its rule, and its text in the prompt."""

    kind: str
    kwargs: dict[str, Any]
    spans: tuple[str, ...]


@dataclass(frozen=True)
class ConstrainedPrompt:
    """A prompt with at least one instruction."""

    text: str
    constraints: tuple[Constraint, ...]


def read_constrained(path: StrPath) -> list[ConstrainedPrompt]:
    """Read `{prompt, related_prompt_list: [{instruction_id, kwargs, prompt_spans}]}` (JSON, JSONL).

    Without `prompt_spans` they are found by rule. Raises RainError naming file, line and field.
    """
    found = read_samples(path, _parse)[1]
    return list({prompt.text: prompt for prompt in reversed(found)}.values())[::-1]


def make_sample(prompt: ConstrainedPrompt, kept: Kept) -> dict[str, Any]:
    """The sample of an answer that follows every instruction, with its spans.

    Raises DroppedError naming the kind that is not followed.
    """
    for item in prompt.constraints:
        if not check(item.kind, item.kwargs, prompt.text, kept.response):
            raise DroppedError(f"does not follow {item.kind}")
    related = [_related(item, kept.response) for item in prompt.constraints]
    return {"prompt": prompt.text, **kept.fields, "related_prompt_list": related}


def _related(item: Constraint, response: str) -> dict[str, Any]:
    follows, unrelated = response_spans(item.kind, item.kwargs, response)
    return {
        "instruction_id": item.kind,
        "kwargs": item.kwargs,
        "prompt_spans": list(item.spans),
        "response_spans": follows,
        "unrelated_response_spans": unrelated,
    }


def _parse(source: str, value: object) -> ConstrainedPrompt:
    fields = Fields(source, value)
    prompt = fields.required("prompt", "every line needs a prompt")
    items = fields.items("related_prompt_list")
    if not items:
        raise RainError(f"{source}: field 'related_prompt_list' is empty: name an instruction")
    return ConstrainedPrompt(prompt, tuple(_constraint(source, prompt, *item) for item in items))


def _constraint(source: str, prompt: str, label: str, value: object) -> Constraint:
    fields = Fields(source, value, label)
    kind = fields.required("instruction_id", "it names the rule")
    if kind not in RULES:
        raise RainError(
            f"{source}: field '{label}.instruction_id' is {kind!r}, for which there is no rule; "
            f"known are {', '.join(RULES)}"
        )
    kwargs = _kwargs(source, f"{label}.kwargs", kind, fields.value("kwargs"))
    spans = fields.spans("prompt_spans", optional=True)
    missing = [span for span in spans if span not in prompt]
    if missing:
        raise RainError(
            f"{source}: field '{label}.prompt_spans' has a text that is not in the "
            f"prompt: {missing[0]!r}; spans are verbatim"
        )
    spans = spans or tuple(prompt_spans(kind, kwargs, prompt))
    if not spans:
        raise RainError(
            f"{source}: no sentence of the prompt was found that gives {kind}; name it in "
            f"'{label}.prompt_spans'"
        )
    return Constraint(kind, kwargs, spans)


def _kwargs(source: str, label: str, kind: str, value: object) -> dict[str, Any]:
    given = value if isinstance(value, JsonObject) else {}
    found: dict[str, Any] = {}
    for argument in ARGUMENTS.get(kind, ()):
        name = argument.rstrip("?")
        if given.get(name) is None and argument.endswith("?"):
            continue
        found[name] = _argument(f"{source}: field '{label}.{name}'", name, given.get(name))
    return found


def _argument(where: str, name: str, value: object) -> Any:
    """The value if it is of the type that goes with the name; RainError says what that is."""
    if name in _LISTS:
        expected = "a list of texts"
        good = isinstance(value, list) and value and all(_is_text(item) for item in value)
    elif name in _CHOICES:
        expected = f"one of {', '.join(_CHOICES[name])}"
        good = value in _CHOICES[name]
    elif name in _TEXTS:
        expected, good = "a text", _is_text(value)
    else:
        expected = "a whole number"
        number = float(value) if type(value) in (int, float) else -1.0  # type: ignore[arg-type]
        good = number >= 0 and number.is_integer()
        value = int(number) if good else value
    if not good:
        found = "nothing" if value is None else repr(value)[:60]
        raise RainError(f"{where} must be {expected}, found {found}")
    return value


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
