"""Reading weights before they are needed: a thread brings them into the system's page cache.

Nothing is handed over, so nothing can differ or fail: who needs a weight reads it as ever, and
finds it in memory. What the thread cannot read it leaves; the reader proper says what is wrong.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

LOG = logging.getLogger(__name__)
NAME = "rain-read-ahead"
STEP = 4 * 1024**2
PATIENCE = 5.0  # seconds; a network disk that hangs must not hold up an interruption


@dataclass(frozen=True)
class Piece:
    """A range of bytes of one file."""

    path: Path
    start: int
    size: int


@dataclass
class Progress:
    """What the thread has read so far, in bytes; `done` is set when it has ended."""

    bytes: int = 0
    done: threading.Event = field(default_factory=threading.Event)


@contextmanager
def reading_ahead(pieces: Iterable[Piece]) -> Iterator[Progress]:
    """Read the pieces in the background; leaving the context stops that where it is.

    `pieces` is gone through in the thread, so that finding them costs no time either.
    """
    progress, stop = Progress(), threading.Event()
    thread = threading.Thread(target=_read, args=(pieces, progress, stop), name=NAME, daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        stop.set()
        thread.join(PATIENCE)


def tensor_pieces(folder: str, places: Mapping[str, str], prefix: str) -> Iterator[Piece]:
    """Where the tensors lie whose names begin with `prefix`; places: shard file by tensor name.

    Raises OSError, ValueError, KeyError or TypeError for what is no safetensors file.
    """
    shards: dict[str, list[str]] = {}
    for name, shard in places.items():
        if name.startswith(prefix):
            shards.setdefault(shard, []).append(name)
    for shard, names in shards.items():
        path = Path(folder, shard)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError(f"{path}: no safetensors file")
            header = json.loads(file.read(length))
        for start, end in _joined(sorted(header[name]["data_offsets"] for name in names)):
            yield Piece(path, 8 + length + start, end - start)


def _joined(spans: list[list[int]]) -> Iterator[tuple[int, int]]:
    """Sorted (start, end) pairs, those that follow each other as one."""
    start, end = spans[0]
    for next_start, next_end in spans[1:]:
        if next_start != end:
            yield start, end
            start = next_start
        end = next_end
    yield start, end


def _read(pieces: Iterable[Piece], progress: Progress, stop: threading.Event) -> None:
    buffer = memoryview(bytearray(STEP))
    try:
        for piece in pieces:
            with piece.path.open("rb", buffering=0) as file:
                file.seek(piece.start)
                left = piece.size
                while left > 0 and not stop.is_set():
                    count = file.readinto(buffer[: min(STEP, left)])
                    if not count:
                        break
                    left -= count
                    progress.bytes += count
            if stop.is_set():
                break
    except (OSError, ValueError, KeyError, TypeError) as error:
        LOG.debug("not read ahead: %s", error)
    finally:
        progress.done.set()
