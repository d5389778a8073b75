"""A context variable that has a value inside a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def holding(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Inside the block the variable has this value, afterwards the earlier one again."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
