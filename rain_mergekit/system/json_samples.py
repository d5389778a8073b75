"""Calibration sets on disk: one JSON list, or one JSON object on each line."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from rain_mergekit.errors import RainError
from rain_mergekit.system.untrusted_input import MIB, is_lfs_pointer, read_regular

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


S = TypeVar("S")
_DIGITS = 100
_BLOCK = 2**20
LIMIT = 1024 * MIB  # a set is held in memory as a whole, a few times over
StrPath = str | os.PathLike[str]


class JsonObject(dict[str, object]):
    """A JSON object that remembers which names occurred twice (a plain dict does not)."""

    def __init__(self, pairs: list[tuple[str, object]]) -> None:
        super().__init__(pairs)
        counts = Counter(name for name, _ in pairs) if len(self) < len(pairs) else {}
        self.repeated = {name for name, count in counts.items() if count > 1}


def read_samples(path: StrPath, parse: Callable[[str, object], S]) -> tuple[str, list[S]]:
    """Read a whole set: (SHA-256 of the file's bytes as hex, samples in file order).

    A JSON list or JSON lines, told apart by the first character, UTF-8 with or without a byte
    order mark; blank lines are ignored. Raises RainError for anything else, and for an empty set.
    """
    data = _read_bytes(path)
    samples = [parse(source, value) for source, value in _rows(str(path), _decode(path, data))]
    if not samples:
        raise RainError(f"{path}: the file holds no samples")
    return hashlib.sha256(data).hexdigest(), samples


def read_text(path: StrPath) -> str:
    """The file's text without a byte order mark; RainError if it is not UTF-8."""
    return _decode(path, _read_bytes(path))


def file_digest(path: StrPath) -> str | None:
    """SHA-256 of a file's bytes, as `read_samples` gives it; None if they cannot be read."""
    found = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while block := file.read(_BLOCK):  # calibration files can be larger than the memory
                found.update(block)
        return found.hexdigest()
    except (OSError, ValueError):  # ValueError: a path that no file can have
        return None


def read_json(path: StrPath) -> object:
    """One JSON value of any kind; RainError if the text is not JSON."""
    return _parse_json(str(path), read_text(path), 1)


def _read_bytes(path: StrPath) -> bytes:
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise RainError(f"{path}: not a regular file; give a JSON or JSONL file")
        if is_lfs_pointer(Path(path)):
            raise RainError(
                f"{path}: a git-lfs pointer, not the file itself: run `git lfs pull` in that folder"
            )
        return read_regular(path, LIMIT)
    except (OSError, ValueError) as exc:  # ValueError: a null byte in the name
        reason = getattr(exc, "strerror", None) or str(exc)
        raise RainError(f"{str(path)!r}: cannot read the calibration set: {reason}") from exc


def _decode(path: StrPath, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise RainError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from exc


def _rows(path: str, text: str) -> Iterator[tuple[str, object]]:
    if text.lstrip()[:1] == "[":
        values = cast("list[object]", _parse_json(path, text, 1))
        yield from ((f"{path}[{index}]", value) for index, value in enumerate(values))
        return
    # not splitlines(): JSON strings may hold U+2028 and other separators as they are
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _parse_json(path, line, number)


def _whole(text: str) -> int | float:
    """A JSON integer; as a float where it has more digits than int() accepts."""
    return int(text) if len(text) < _DIGITS else float(text)


def _parse_json(path: str, text: str, line: int) -> object:
    try:
        value: object = json.loads(text, object_pairs_hook=JsonObject, parse_int=_whole)
    except json.JSONDecodeError as exc:
        raise RainError(
            f"{path}:{line + exc.lineno - 1}: not valid JSON ({exc.msg}, column {exc.colno}); "
            "expected one JSON list of samples, or one JSON object on each line"
        ) from exc
    except RecursionError as exc:
        raise RainError(f"{path}:{line}: the JSON is nested too deeply to be a sample") from exc
    return value
