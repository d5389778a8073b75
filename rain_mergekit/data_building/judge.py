"""Whether an answer has exactly one complete thinking block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rain_mergekit.data_building.tasks import Writer, Written
from rain_mergekit.text.marker_detection import tokenizer_markers
from rain_mergekit.text.markers import Markers
from rain_mergekit.text.thinking_blocks import split_thinking


class DroppedError(Exception):
    """An answer that is not kept; the text is the reason."""


@dataclass(frozen=True)
class Kept:
    """An answer with one complete thinking block: the fields of its sample, and its parts."""

    fields: dict[str, Any]
    thinking: str
    response: str


def known_format(
    writer: Writer, markers: Markers | None, template: Mapping[str, Any]
) -> tuple[Markers | None, bool | None]:
    """The thinking markers, and whether the chat template opens the block.

    Behind a server they are the given markers, and None, as its template is not known. markers
    None: those of the model. template: arguments of the chat template.
    """
    tokenizer = getattr(writer, "tokenizer", None)
    if tokenizer is None:
        return markers, None
    found = markers or tokenizer_markers(tokenizer, template)
    return found, writer.opens_block("probe", found)  # type: ignore[attr-defined]


def keep(written: Written, markers: Markers, *, opened_by_template: bool | None) -> Kept:
    """The answer, verbatim; DroppedError if its thinking block is not complete.

    opened_by_template: None where the template is not known (a server's): an answer without the
    open marker is then taken for one whose template has written it.
    """
    if not written.finished:
        raise DroppedError("cut off by the token limit")
    text = written.text if written.reasoning is None else _together(written, markers)
    opens, closes = (text.count(marker) for marker in (markers.open, markers.close))
    if opened_by_template is None or written.reasoning is not None:
        opened_by_template = not opens
    if closes != 1 or opens > 1 or not (opens or opened_by_template):
        raise DroppedError("not exactly one thinking block")
    thought = split_thinking(text, markers, opened_by_template=opened_by_template)
    if not thought.opened:
        raise DroppedError("text before the thinking block")
    if opens and markers.open in thought.thinking + thought.response:
        raise DroppedError("not exactly one thinking block")
    _check(thought.thinking, thought.response)
    return Kept({"output": text}, thought.thinking, thought.response)


def _together(written: Written, markers: Markers) -> str:
    """The whole output, put together from the parts in which a server returns it.

    Only if the server has kept the white space around the close marker (vLLM does), which belongs
    to the format. Thinking that still begins with white space has not been stripped: its model
    writes none at the end. A template that writes the open marker is not asked: readers drop one
    that stands there twice.
    """
    reasoning, text = written.reasoning or "", written.text
    thinking_stripped = bool(reasoning) and reasoning == reasoning.strip()
    rest_stripped = bool(text) and text == text.lstrip()
    if (markers.gaps[1] and thinking_stripped) or (markers.gaps[2] and rest_stripped):
        raise DroppedError("taken apart by the server, without the white space around the marker")
    return f"{markers.open}{reasoning}{markers.close}{text}"


def _check(thinking: str, response: str) -> None:
    if not thinking:
        raise DroppedError("nothing in the thinking block")
    if not response:
        raise DroppedError("nothing after the thinking block")
