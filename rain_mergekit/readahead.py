"""Reading weights before they are needed: the system is asked to fetch them while a layer computes.

Nothing is handed over, so nothing can differ or fail: who needs a weight reads it as ever, and
finds it in the page cache. What cannot be announced is left; the reader proper says what is wrong.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

LOG = logging.getLogger(__name__)
STEP = 2 * 1024**2  # Linux may cut a longer request short


@dataclass(frozen=True)
class Piece:
    """A range of bytes of one file."""

    path: Path
    start: int
    size: int


def announce(pieces: Iterable[Piece]) -> None:
    """Ask the system to read the pieces into its page cache; returns without waiting for them.

    Does nothing where the system has no such call. No thread: one that copies the bytes takes the
    processor from the layer that computes, and its start can fail when memory is short.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    try:
        for piece in pieces:
            with piece.path.open("rb", buffering=0) as file:
                for start in range(piece.start, piece.start + piece.size, STEP):
                    os.posix_fadvise(file.fileno(), start, STEP, os.POSIX_FADV_WILLNEED)
    except (OSError, ValueError, KeyError, TypeError) as error:
        LOG.debug("not announced: %s", error)


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
