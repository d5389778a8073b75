"""A generated text taken apart: the thinking block and the response after it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Thought:
    """One output. Without a close marker an opened block never ended: there is no response."""

    opened: bool
    closed: bool
    thinking: str
    response: str

    @property
    def complete(self) -> bool:
        """A block that was opened, holds something, and was closed."""
        return self.opened and self.closed and bool(self.thinking)


def split_thinking(
    text: str, open_marker: str, close_marker: str, *, opened_by_template: bool = False
) -> Thought:
    """Split what a model wrote after the prompt; both parts come without surrounding space.

    A block counts as opened where the output begins with the marker, or the template wrote it.
    """
    body = text.lstrip()
    opened = body.startswith(open_marker)
    if opened:
        body = body.removeprefix(open_marker)
    elif not opened_by_template:
        return Thought(False, close_marker in body, "", body.strip())
    thinking, close, response = body.partition(close_marker)
    return Thought(True, bool(close), thinking.strip(), response.strip())
