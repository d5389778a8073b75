"""An evenly spaced choice of items, always the same one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def evenly_spaced(items: Sequence[T], limit: int) -> tuple[T, ...]:
    """At most `limit` of the items: the middle one of each of `limit` equal parts."""
    if len(items) <= limit:
        return tuple(items)
    step = len(items) / limit
    return tuple(items[int((index + 0.5) * step)] for index in range(limit))


def first_of_parts(items: Sequence[T], limit: int) -> tuple[T, ...]:
    """At most `limit` of the items: the first one of each of `limit` equal parts."""
    limit = min(limit, len(items))
    return tuple(items[index * len(items) // limit] for index in range(limit))


def with_both_ends(items: Sequence[T], limit: int) -> tuple[T, ...]:
    """At most `limit` (2 or more) of the items, the first and the last among them."""
    if len(items) <= limit:
        return tuple(items)
    last = len(items) - 1
    return tuple(items[round(index * last / (limit - 1))] for index in range(limit))
