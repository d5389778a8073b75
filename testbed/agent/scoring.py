"""Judging what a model says to a prompt that asks for a tool; no model and no torch in here."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rain_mergekit.text.markers import Markers
from rain_mergekit.text.thinking_blocks import split_thinking
from testbed.agent.tools import CLOSE, OPEN

THINKING = Markers("<think>", "</think>")


@dataclass(frozen=True)
class Score:
    """What one output did.

    thought: a thinking block that is whole and not empty; thought_right: and says what is right.
    form: nothing but one call after it, in valid JSON, of the tool that was asked for, with its
    arguments' names and kinds. number: the count in the call, or in a plain answer without one, is
    right. both: exactly the right call. at_once: and without a thinking block before it.
    """

    thought: bool
    thought_right: bool
    form: bool
    number: bool
    both: bool
    at_once: bool


def called(response: str) -> Any:
    """What stands between the tags of the one call that a response is; None if it is none."""
    if not (response.startswith(OPEN) and response.endswith(CLOSE)):
        return None
    try:
        return json.loads(response.removeprefix(OPEN).removesuffix(CLOSE))
    except ValueError:
        return None


def kinds(value: Any, things: frozenset[str]) -> Any:
    """The structure of arguments: names and kinds of values; a thing as a name is any thing."""
    if isinstance(value, dict):
        return {("thing" if k in things else k): kinds(v, things) for k, v in value.items()}
    if isinstance(value, list):
        return [kinds(one, things) for one in value]
    return type(value).__name__


def numbers(value: Any) -> Iterator[int]:
    """All whole numbers in a call's arguments."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def score(record: Mapping[str, Any], output: str, things: frozenset[str]) -> Score:
    """Judge one output against its prompt's record. things: the words that may be counted."""
    parts = split_thinking(output, THINKING)
    made = called(parts.response)
    wanted = {"name": record["tool"], "arguments": record["arguments"]}
    form = isinstance(made, dict) and made.get("name") == record["tool"]
    form = form and kinds(made, things) == kinds(wanted, things)
    if isinstance(made, dict):
        number = list(numbers(made.get("arguments"))) == [record["number"]]
    else:
        number = parts.response == record["plain"]
    return Score(
        thought=parts.complete,
        thought_right=parts.complete and parts.thinking == record["thinking"],
        form=form,
        number=number,
        both=form and made == wanted,
        at_once=not parts.opened and form and made == wanted,
    )
