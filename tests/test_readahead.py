"""Reading ahead: the right bytes, stopped at once, and never the one who complains."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import Tiny

from rain_mergekit.errors import RainError
from rain_mergekit.readahead import NAME, Piece, reading_ahead, tensor_pieces

SHARDS = {
    "a.safetensors": ("model.layers.1.q", "model.layers.10.q", "model.layers.1.k", "model.norm"),
    "b.safetensors": ("model.layers.1.v",),
    "c.safetensors": ("model.layers.2.q",),
}


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == NAME]


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


def test_everything_is_read(tmp_path: Path, places: dict[str, str]) -> None:
    with reading_ahead(tensor_pieces(str(tmp_path), places, "model.layers.")) as progress:
        assert progress.done.wait(60)
    assert progress.bytes == 5 * 3 * 5 * 4


@pytest.mark.parametrize("harm", ["missing", "empty", "no header", "other names", "cut off"])
def test_what_cannot_be_read_is_left(tmp_path: Path, places: dict[str, str], harm: str) -> None:
    shard = tmp_path / "a.safetensors"
    content = shard.read_bytes()
    if harm == "missing":
        shard.unlink()
    elif harm == "other names":
        save_file({"x": torch.zeros(2)}, shard)
    else:
        shard.write_bytes({"empty": b"", "no header": b"x" * 99, "cut off": content[:-140]}[harm])
    with reading_ahead(tensor_pieces(str(tmp_path), places, "model.layers.1.")) as progress:
        assert progress.done.wait(60)
    assert progress.bytes < 3 * 3 * 5 * 4


def test_leaving_stops_it(tmp_path: Path) -> None:
    path = tmp_path / "large"
    size = 2**40
    with path.open("wb") as file:
        file.truncate(size)  # holes: nothing is on the disk
    start = time.monotonic()
    with reading_ahead([Piece(path, 0, size)]) as progress:
        while not progress.bytes:
            time.sleep(0.001)
        assert threads() == [NAME]
    assert time.monotonic() - start < 30
    assert progress.done.is_set()
    assert 0 < progress.bytes < size
    assert not threads()


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
    assert not threads()
