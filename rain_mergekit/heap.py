"""Hand freed memory back to the system, where the C library would rather keep it."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


@cache
def _trim() -> Any:
    """glibc's malloc_trim, or None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back() -> None:
    """Return free pages of the heap.

    glibc serves blocks up to 32 MiB from its heap, and the tensors of one phase leave holes that
    those of the next do not fit; without this, memory grows with the number of layers.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
