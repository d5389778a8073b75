"""Weights that are taken away while a calibration reads them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import Tiny

from rain_mergekit.errors import RainError


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
    log = logging.getLogger("rain_mergekit.calibration.engine")
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
