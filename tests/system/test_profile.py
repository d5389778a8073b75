"""Phases of a run: their seconds by a clock that the test sets, and the trace of a calibration."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import Tiny

from rain_mergekit.cli import cli
from rain_mergekit.system import profile as module
from rain_mergekit.system.profile import Profile, phase, profiling


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture(name="clock")
def _clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_an_inner_phase_pauses_the_outer_one(clock: Clock) -> None:
    profile = Profile()
    with profiling(profile), phase("solve"):
        clock.now += 2
        with phase("load"):
            clock.now += 3
        clock.now += 4
    clock.now += 1
    assert profile.seconds() == {"solve": 6.0, "load": 3.0}
    assert profile.elapsed == 10.0


def test_a_phase_ends_with_an_error_too(clock: Clock) -> None:
    def failing() -> None:
        with profiling(profile), phase("load"):
            clock.now += 1
            raise ValueError("x")

    profile = Profile()
    with pytest.raises(ValueError, match="x"):
        failing()
    assert profile.seconds() == {"load": 1.0}


def test_other_threads_count_by_themselves(clock: Clock, tmp_path: Path) -> None:
    profile = Profile()

    def read() -> None:
        with profile.phase("load"):
            clock.now += 5
            profile.moved("load", 700)

    with profiling(profile), phase("forward"):
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    assert profile.seconds() == {"forward": 5.0}
    assert profile.seconds(main=False) == {"load": 5.0}
    profile.write(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    drawn = {(e["name"], e["tid"], e["dur"]) for e in trace["traceEvents"] if e["ph"] == "X"}
    assert drawn == {("forward", 0, 5e6), ("load", 1, 5e6)}
    assert trace["otherData"]["bytes"] == {"load": 700}


def test_without_a_profile_a_phase_does_nothing() -> None:
    with phase("load"):
        module.moved("load", 1)


def test_a_calibration_says_where_its_time_went(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "qwen2").using(fit="streams")
    trace = tmp_path / "trace.json"
    done = CliRunner().invoke(
        cli, ["calibrate", str(tiny.config().path), "--profile", str(trace), "--device", "cpu"]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(trace.read_text())["otherData"]
    assert found["seconds"].keys() >= {"load", "forward", "solve", "write"}
    stored = sum(
        (tiny.folder / role / "model.safetensors").stat().st_size
        for role in ("reasoning", "instruct")
    )
    assert 0 < found["bytes"]["load"] <= 2 * stored  # once to compare the answers, once to fit
    assert "load" in found["reader"]
    for words in ("waiting for weights", "forward passes", "solving", "GB/s"):
        assert words in done.output


def test_a_trace_replaces_no_other_file(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "qwen2").using(fit="streams")
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    done = CliRunner().invoke(
        cli, ["calibrate", str(tiny.config().path), "--profile", str(other), "--device", "cpu"]
    )
    assert done.exit_code == 1
    assert "will not be overwritten" in done.stderr
    assert other.read_text() == "mine"
