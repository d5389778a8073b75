"""Results are written while the next layer computes, and are there before the state is saved."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hangs import HANGS
from safetensors.torch import load_file
from tiny import Tiny

from rain_mergekit.calibration import engine, stream_engine
from rain_mergekit.calibration.result_writer import ResultWriter
from rain_mergekit.calibration.work_folder import WorkDir

LAYERS = 3
HOMES = {"streams": (stream_engine, "write_stream_layer"), "projection": (engine, "write_part")}


@pytest.fixture(scope="module", name="tiny")
def _tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny.make(tmp_path_factory.mktemp("writer"), "llama", num_hidden_layers=LAYERS)


@pytest.mark.parametrize("fit", HOMES)
def test_a_layer_is_written_while_the_next_computes(
    tiny: Tiny, fit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer k is written only once layer k + 1 computes: without a thread this would never end."""
    begun = [threading.Event() for _ in range(LAYERS + 1)]
    begun[LAYERS].set()
    home, name = HOMES[fit]
    write, engine_class = getattr(home, name), home.__dict__
    kind = engine_class["StreamEngine" if fit == "streams" else "CalibrationEngine"]
    fit_layer = kind._layer

    def beginning(self: Any, index: int, *rest: Any) -> Any:
        begun[index].set()
        return fit_layer(self, index, *rest)

    def waiting(path: Path, layer: str, result: Any) -> None:
        assert begun[int(layer.rpartition(".")[2]) + 1].wait(HANGS)
        write(path, layer, result)

    one = tiny.using(f"whole-{fit}.rain.safetensors", fit=fit)
    one.calibrate()
    monkeypatch.setattr(kind, "_layer", beginning)
    monkeypatch.setattr(home, name, waiting)
    two = tiny.using(f"meanwhile-{fit}.rain.safetensors", fit=fit)
    two.calibrate()
    assert two.path.read_bytes() == one.path.read_bytes()
    assert load_file(two.path)


@pytest.mark.parametrize("fit", HOMES)
def test_the_state_is_saved_once_the_results_are_there(
    tiny: Tiny, fit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on after that state needs them."""
    save, seen = WorkDir._drop_snapshots, list[int]()

    def dropping(self: WorkDir, except_for: int | None) -> None:
        if except_for is not None:
            seen.append(except_for)
            assert all(self.part(layer).exists() for layer in range(except_for + 1))
        save(self, except_for)

    monkeypatch.setattr(WorkDir, "_drop_snapshots", dropping)
    tiny.using(f"saved-{fit}.rain.safetensors", fit=fit).calibrate(snapshot_seconds=0)
    assert seen == list(range(LAYERS - 1))


def failing() -> None:
    raise OSError("no room")


def writing(*writes: Callable[[], None], then: BaseException | None = None) -> None:
    with ResultWriter() as writer:
        for write in writes:
            writer.submit(write)
        if then is not None:
            raise then


def test_what_goes_wrong_is_raised_and_nothing_more_is_written() -> None:
    written: list[int] = []
    with pytest.raises(OSError, match="no room"):
        writing(failing, lambda: written.append(1))
    with pytest.raises(OSError, match="no room"):
        writing(failing)
    assert not written


def test_an_interruption_is_not_hidden_by_a_failing_write() -> None:
    with pytest.raises(KeyboardInterrupt):
        writing(failing, then=KeyboardInterrupt())
