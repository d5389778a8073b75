"""Split a generated text into thinking blocks and the response after the last one."""

from __future__ import annotations

from dataclasses import dataclass

from rain_mergekit.text.markers import Markers, first


@dataclass(frozen=True)
class Thought:
    """The parts of one output; no response if a block was never closed.

    `thinking` joins the blocks of an output with several.
    """

    opened: bool
    closed: bool
    thinking: str
    response: str

    @property
    def complete(self) -> bool:
        """Whether a block was opened, is not empty, and was closed."""
        return self.opened and self.closed and bool(self.thinking)


def split_thinking(text: str, markers: Markers, *, opened_by_template: bool = False) -> Thought:
    """Split what a model wrote after the prompt; both parts come without surrounding space.

    A block counts as opened where the output begins with a marker, or the template wrote it.
    """
    body = text.lstrip()
    span = first(body, markers.opens, 0, len(body))
    if span is None or span[0] > 0:
        span = (0, 0)
    if span == (0, 0) and not opened_by_template:
        closed = first(body, markers.closes(), 0, len(body)) is not None
        return Thought(False, closed, "", body.strip())
    blocks, _ = markers.scan(body, opened=span)
    parts = [body[block.open[1] : block.close[0]].strip() for block in blocks]
    end = blocks[-1].close[1] if blocks else 0
    again = first(body, markers.opens, end, len(body)) if blocks else span
    if again is not None:
        parts.append(body[again[1] :].strip())
    response = "" if again is not None else body[end:].strip()
    return Thought(True, again is None, "\n\n".join(filter(None, parts)), response)
