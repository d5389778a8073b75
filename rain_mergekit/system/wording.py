"""Words in messages: plural forms, and what somebody may have meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def counted(count: int, one: str, many: str | None = None) -> str:
    """`1 layer`, `4 layers`."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`, did you mean 'window'?` where one of the known words is near, else nothing."""
    found = get_close_matches(word.lower(), list(known), n=1, cutoff=0.7)
    return f", did you mean {found[0]!r}?" if found else ""
