"""A calibration that is stopped anywhere goes on, and ends with the very same file."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from forks import Forks, wait_for_stop
from tiny import Tiny

from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import calibrate
from rain_mergekit.calibration.work_folder import WorkDir
from rain_mergekit.errors import RainError

LAYERS = 6
CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(scope="module", name="forks")
def _forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture(scope="module", name="tiny")
def _tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("resume")
    tiny = Tiny.make(folder, "qwen2", num_hidden_layers=LAYERS)
    tiny.with_head("model.embed_tokens.weight")
    return tiny.using(coefficients="normalized", alpha_min=0.0, lm_head="unseen")


@pytest.fixture(scope="module", name="whole")
def _whole(tiny: Tiny) -> bytes:
    """The file of a run that nothing stopped."""
    tiny.calibrate()
    content = tiny.path.read_bytes()
    tiny.path.unlink()
    return content


@pytest.fixture(autouse=True)
def _nothing_left(tiny: Tiny) -> None:
    """What a failed test left would make the next ones fail too, and hide which was the first."""
    tiny.path.unlink(missing_ok=True)
    shutil.rmtree(work_folder(tiny), ignore_errors=True)


def work_folder(tiny: Tiny) -> Path:
    return tiny.path.with_name(tiny.path.name + ".work")


def command(tiny: Tiny) -> tuple[object, ...]:
    return ("calibrate", tiny.config().path, "--device", "cpu", "--snapshot-every", "0")


@pytest.mark.parametrize(
    ("stop", "layers"), [(signal.SIGKILL, (0, 3)), (signal.SIGINT, (2,)), (signal.SIGTERM, (1,))]
)
def test_a_stopped_run_goes_on_to_the_same_bytes(
    tiny: Tiny, forks: Forks, whole: bytes, stop: signal.Signals, layers: Sequence[int]
) -> None:
    """After these layers, while the snapshot is written; the process waits there for the signal."""
    for layer, part in zip(layers, ("instruction", "reasoning"), strict=False):
        pid = forks.start(*command(tiny), stop_at=f"hidden-{layer:05d}.{part}")
        assert wait_for_stop(pid)
        os.kill(pid, stop)
        os.kill(pid, signal.SIGCONT)
        assert forks.wait().code == CODES[stop]
    assert not tiny.path.exists()
    summary = tiny.calibrate(snapshot_seconds=0)
    assert summary.first_layer == layers[-1]
    assert tiny.path.read_bytes() == whole
    assert not work_folder(tiny).exists()
    tiny.path.unlink()


def stopped_in_process(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, after: int, **options: bool
) -> None:
    """As Ctrl-C once layer `after` has been saved."""
    save = WorkDir.save

    def saving(self: WorkDir, layer: int, *rest: Any) -> None:
        save(self, layer, *rest)
        if layer == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkDir, "save", saving)
        with pytest.raises(KeyboardInterrupt):
            tiny.calibrate(snapshot_seconds=0, **options)


@pytest.mark.parametrize("layer", range(LAYERS))  # after the last one only the head is left
def test_it_goes_on_after_the_last_saved_layer_and_not_before(
    tiny: Tiny, whole: bytes, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    stopped_in_process(tiny, monkeypatch, layer)
    summary = tiny.calibrate(activation_budget=0)  # where hidden states lie changes nothing
    assert summary.first_layer == layer + 1
    assert tiny.path.read_bytes() == whole
    tiny.path.unlink()


def test_other_settings_begin_anew(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_in_process(tiny, monkeypatch, 2)
    (work_folder(tiny) / "hidden-00009.reasoning.0").write_bytes(b"left by a killed run")
    other = tiny.using(calibration=tiny.calibration, coefficients="off")
    assert other.calibrate().first_layer == 0
    resumed = tiny.path.read_bytes()
    tiny.path.unlink()
    other.calibrate()
    assert tiny.path.read_bytes() == resumed
    tiny.path.unlink()


@pytest.mark.parametrize("first", [False, True])
def test_another_order_of_sums_begins_anew(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    stopped_in_process(tiny, monkeypatch, 2, deterministic=first)
    assert tiny.calibrate(deterministic=not first).first_layer == 0


def test_without_a_snapshot_nothing_is_left(tiny: Tiny) -> None:
    broken = tiny.using(rank_by="full", max_rank=10_000)
    with pytest.raises(RainError, match="fills all"):
        broken.calibrate()
    assert not work_folder(tiny).exists()


def test_two_runs_at_once_are_one_clear_error(tiny: Tiny, forks: Forks) -> None:
    config = tiny.config()
    pid = forks.start(*command(tiny), stop_at="layer-00000")
    assert wait_for_stop(pid)
    with pytest.raises(RainError, match="another calibration is writing there"):
        calibrate(config, RunOptions(quiet=True))
    os.kill(pid, signal.SIGKILL)
    assert forks.wait().code == -signal.SIGKILL
