"""What the kernel tells of files: opened for writing, changed, renamed, made or removed.

Python's audit hooks know nothing of what compiled code opens; inotify(7) tells of everybody.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Of <sys/inotify.h>; the second comes whether or not anything was written.
WRITTEN, OPENED_FOR_WRITING, ATTRIBUTES = 0x002, 0x008, 0x004
MOVED, MADE, REMOVED = 0x0C0, 0x100, 0x200
ITSELF, MISSED = 0xC00, 0x4000  # removed or moved; more events than the kernel keeps
ALL = WRITTEN | OPENED_FOR_WRITING | ATTRIBUTES | MOVED | MADE | REMOVED | ITSELF
_EVENT = struct.Struct("iIII")


@contextmanager
def untouched(*places: Path) -> Iterator[None]:
    """Fails if anybody writes to one of these files or folders meanwhile, or opens it to write."""
    watch = Watch(*places)
    try:
        yield
        told = watch.told()
        assert not told, f"touched: {sorted(told)}"
    finally:
        os.close(watch.fd)


class Watch:
    """Over files, and over folders with all that is in them."""

    def __init__(self, *places: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self.fd >= 0, os.strerror(ctypes.get_errno())
        self.paths: dict[int, Path] = {}
        for path in (item for place in places for item in (place, *place.rglob("*"))):
            number = libc.inotify_add_watch(self.fd, os.fsencode(path), ALL)
            assert number >= 0, f"{path}: {os.strerror(ctypes.get_errno())}"
            self.paths[number] = path

    def told(self) -> set[str]:
        """The paths of all that something was done to since the last time."""
        found = set()
        with suppress(BlockingIOError):
            while data := os.read(self.fd, 2**16):
                found |= set(self._events(data))
        return found

    def _events(self, data: bytes) -> Iterator[str]:
        at = 0
        while at < len(data):
            number, kind, _, length = _EVENT.unpack_from(data, at)
            at += _EVENT.size
            assert not kind & MISSED, "more happened than the kernel keeps"
            name = os.fsdecode(data[at : at + length].rstrip(b"\0"))
            at += length
            if kind & ALL:
                yield str(self.paths[number] / name)
