"""Whether an answer has exactly one complete thinking block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rain_mergekit.building.tasks import Written
from rain_mergekit.rendering import Markers
from rain_mergekit.thinking import split_thinking


class DroppedError(Exception):
    """An answer that is not kept; the text is the reason."""


@dataclass(frozen=True)
class Kept:
    """An answer with one complete thinking block: the fields of its sample, and its parts."""

    fields: dict[str, Any]
    thinking: str
    response: str


def keep(written: Written, markers: Markers, *, opened_by_template: bool | None) -> Kept:
    """The answer, verbatim where that is known; DroppedError if its thinking block is not complete.

    opened_by_template: None where the template is not known (a server's): an answer without the
    open marker is then taken for one whose template has written it.
    """
    if not written.finished:
        raise DroppedError("cut off by the token limit")
    if written.reasoning is not None:
        return _apart(written.reasoning, written.text, markers)
    opens, closes = (written.text.count(marker) for marker in (markers.open, markers.close))
    if opened_by_template is None:
        opened_by_template = not opens
    if closes != 1 or opens > 1 or not (opens or opened_by_template):
        raise DroppedError("not exactly one thinking block")
    thought = split_thinking(written.text, markers, opened_by_template=opened_by_template)
    if not thought.opened:
        raise DroppedError("text before the thinking block")
    if opens and markers.open in thought.thinking + thought.response:
        raise DroppedError("not exactly one thinking block")
    _check(thought.thinking, thought.response)
    return Kept({"output": written.text}, thought.thinking, thought.response)


def _apart(reasoning: str, text: str, markers: Markers) -> Kept:
    """A server that separates the parts has dropped the white space around the markers."""
    if any(
        marker in part for marker in (markers.open, markers.close) for part in (reasoning, text)
    ):
        raise DroppedError("not exactly one thinking block")
    thinking, response = reasoning.strip(), text.strip()
    _check(thinking, response)
    return Kept({"reasoning": thinking, "response": response}, thinking, response)


def _check(thinking: str, response: str) -> None:
    if not thinking:
        raise DroppedError("nothing in the thinking block")
    if not response:
        raise DroppedError("nothing after the thinking block")
