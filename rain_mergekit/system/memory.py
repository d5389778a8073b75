"""Turn running out of memory into one message with a remedy; return freed memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from rain_mergekit.errors import RainError

_WORDS = ("out of memory", "allocate memory", "bad_alloc", "can't start new thread")
CALIBRATION = (
    "take a smaller --activation-budget, max_tokens, content_rows or instruction_rows, or another "
    "--device or --dtype (mergekit-rain calibrate CONFIG --plan says what is needed); a "
    "calibration goes on after its last saved layer"
)
MERGE = (
    "take a smaller --out-shard-size or --activation-budget, or close other programs; no model was "
    "written"
)


class OutOfMemory(RainError):
    """There was not enough memory; the message says where, for what, and what to do."""


def out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or one that led to it, says that memory ran out.

    Python's own error, torch's on the CPU (a RuntimeError), torch's on a GPU, or the system's.
    """
    while error is not None:
        text = str(error).lower()
        if isinstance(error, MemoryError) or (
            isinstance(error, Exception)
            and not isinstance(error, OutOfMemory)
            and any(words in text for words in _WORDS)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def naming_shortage(where: str, remedy: str) -> Iterator[None]:
    """Convert out-of-memory errors of any library into one OutOfMemory with place and remedy."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not out_of_memory(error):
            raise
        raise OutOfMemory(shortage(error, where, remedy)) from None


def shortage(error: BaseException, where: str, remedy: str) -> str:
    """The message: where, the error's own first line, and what to do."""
    detail = " ".join(str(error).split())[:200]
    return f"out of memory {where}{f' ({detail})' if detail else ''}: {remedy}"


@cache
def _trim() -> Any:
    """glibc's malloc_trim, or None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def trim_heap() -> None:
    """Return free pages of the heap to the system.

    glibc serves blocks up to 32 MiB from its heap, and the tensors of one phase leave holes that
    those of the next do not fit; without this, memory grows with the number of layers.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
