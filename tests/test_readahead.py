"""Announced weights: the right bytes come into the page cache, and nothing ever complains."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import Tiny

from rain_mergekit.errors import RainError
from rain_mergekit.readahead import STEP, Piece, announce, tensor_pieces

SHARDS = {
    "a.safetensors": ("model.layers.1.q", "model.layers.10.q", "model.layers.1.k", "model.norm"),
    "b.safetensors": ("model.layers.1.v",),
    "c.safetensors": ("model.layers.2.q",),
}
PAGE = mmap.PAGESIZE


@pytest.fixture(name="places")
def _places(tmp_path: Path) -> dict[str, str]:
    for shard, names in SHARDS.items():
        save_file({name: torch.randn(3, 5) for name in names}, tmp_path / shard)
    return {name: shard for shard, names in SHARDS.items() for name in names}


def test_pieces_are_the_bytes_of_the_layer(tmp_path: Path, places: dict[str, str]) -> None:
    pieces = list(tensor_pieces(str(tmp_path), places, "model.layers.1."))
    found = b"".join(p.path.read_bytes()[p.start : p.start + p.size] for p in pieces)
    wanted = {
        name: tensor.numpy().tobytes()
        for shard in SHARDS
        for name, tensor in load_file(tmp_path / shard).items()
        if name.startswith("model.layers.1.")
    }
    assert len(wanted) == 3
    assert len(found) == sum(map(len, wanted.values()))
    assert all(content in found for content in wanted.values())


def cached(path: Path) -> list[bool]:
    """Which pages of the file are in memory, as the kernel says."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    size = path.stat().st_size
    pages = ctypes.create_string_buffer(-(-size // PAGE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        start = ctypes.c_char.from_buffer(view)
        done = libc.mincore(ctypes.addressof(start), size, pages)
        del start
        assert done == 0, os.strerror(ctypes.get_errno())
    return [bool(byte & 1) for byte in pages.raw]


def dropped(path: Path) -> None:
    """Out of the page cache, where the file system is not the page cache itself."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_announced_pieces_come_into_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(4 * STEP))
    dropped(path)
    start, size = STEP // 2, 2 * STEP + PAGE
    announce([Piece(path, start, size)])
    wanted = slice(start // PAGE, -(-(start + size) // PAGE))
    end = time.monotonic() + 600
    while not all(cached(path)[wanted]):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("harm", ["missing", "empty", "no header", "other names", "cut off"])
def test_what_cannot_be_announced_is_left(
    tmp_path: Path, places: dict[str, str], harm: str
) -> None:
    shard = tmp_path / "a.safetensors"
    content = shard.read_bytes()
    if harm == "missing":
        shard.unlink()
    elif harm == "other names":
        save_file({"x": torch.zeros(2)}, shard)
    else:
        shard.write_bytes({"empty": b"", "no header": b"x" * 99, "cut off": content[:-140]}[harm])
    announce(tensor_pieces(str(tmp_path), places, "model.layers.1."))


class _Thief(logging.Handler):
    """Removes a file as soon as the first layer is finished."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.INFO)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        if "finished layer 1 " in record.getMessage():
            self._path.unlink()


@pytest.fixture(name="log")
def _log() -> Iterator[logging.Logger]:
    log = logging.getLogger("rain_mergekit.run")
    level, handlers = log.level, list(log.handlers)
    log.setLevel(logging.INFO)
    yield log
    log.setLevel(level)
    log.handlers = handlers


@pytest.mark.parametrize("role", ["reasoning", "pretrained"])
def test_weights_that_vanish_are_one_clear_error(
    tmp_path: Path, log: logging.Logger, role: str
) -> None:
    tiny = Tiny.make(tmp_path, "qwen2", num_hidden_layers=3)
    shard = tiny.folder / role / "model.safetensors"
    log.addHandler(_Thief(shard))
    with pytest.raises(RainError, match="cannot read tensor") as caught:
        tiny.calibrate()
    assert str(shard.parent) in str(caught.value)
