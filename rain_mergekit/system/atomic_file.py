"""Replace a file as a whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from rain_mergekit.errors import RainError
from rain_mergekit.system.untrusted_input import shortened

_UNNAMED = getattr(os, "O_TMPFILE", 0)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a new binary file that replaces `path` when the block ends without an error.

    Until then `path` is untouched. On Linux the new file has no name before it is whole, so not
    even `kill -9` leaves a part of one behind (between two system calls that replace an older
    file, a whole one under a temporary name); elsewhere a temporary name in the same folder is
    removed on any exception. A symbolic link keeps pointing where it does. OSError becomes
    RainError.
    """
    target = destination(path)
    temporary = target.with_name(f".{target.name[:64]}.{secrets.token_hex(6)}.tmp")
    try:
        with _create(target.parent, temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not temporary.exists():
                _name(file, target, temporary)
        if temporary.exists():
            temporary.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RainError(
            f"cannot write {os.fspath(path)!r}: {reason}; free space or choose another place"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def refuse_foreign(path: str | Path, what: str, remedy: str, *, ours: bool) -> None:
    """Raise RainError if `path` exists and is not `what`, unless it is `ours` or empty."""
    found = destination(path)
    if not ours and found.is_file() and found.stat().st_size:
        raise RainError(f"{path} exists and is not {what}: it will not be overwritten; {remedy}")


def destination(path: str | os.PathLike[str]) -> Path:
    """Where `path` leads, links followed: a regular file, or a place where nothing is yet.

    Raises RainError for anything else. Replacing a device or a named pipe by a regular file would
    break it for every program on the machine, and root would not even be warned.
    """
    name = shortened(repr(os.fspath(path)))
    try:
        target = Path(os.path.realpath(path))
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return target
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RainError(f"cannot write {name}: {reason}; choose another place") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise RainError(f"cannot write {name}: it is {kind}; name a file")
    return target


def _create(folder: Path, temporary: Path) -> BinaryIO:
    """Create a file without a name where the system can, else one with a temporary name."""
    if _UNNAMED and Path("/proc/self/fd").is_dir():
        with suppress(OSError):  # not on every file system; what is really wrong shows below
            return os.fdopen(os.open(folder, _UNNAMED | os.O_RDWR, 0o666), "w+b")
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(temporary, flags, 0o666), "w+b")


def _name(file: BinaryIO, target: Path, temporary: Path) -> None:
    """Give the unnamed file its name, or a temporary one if the name is taken.

    A folder descriptor makes Python follow the link in /proc.
    """
    folder = os.open(target.parent, os.O_RDONLY)
    source = f"/proc/self/fd/{file.fileno()}"
    try:
        try:
            os.link(source, target.name, dst_dir_fd=folder, follow_symlinks=True)
        except FileExistsError:
            os.link(source, temporary.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
