"""What is shown while a calibration runs."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hangs import HANGS
from tiny import Tiny

from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import calibrate
from rain_mergekit.calibration.progress import Progress

STATE = re.compile(
    r"Layer (\d)/2: +(\d+)%\|.*\| (\S+)/(\S+) \[[\d:]+<[\d:]+, +\S+tok/s, sample (\d+)/(\d+)\]"
)


def test_layers_samples_tokens_a_second_and_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = Tiny.make(tmp_path, "qwen2", num_hidden_layers=2)
    summary = calibrate(tiny.config(), RunOptions())
    passes = sum(summary.layer_passes.values()) // 2
    last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    found = STATE.fullmatch(last.strip())
    assert found is not None, last
    layer, percent, done, total, sample, samples = found.groups()
    assert (layer, percent, done) == ("2", "100", total)
    assert int(sample) == int(samples) == passes


def test_a_continued_run_begins_where_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(4, 3, 50, first=2) as progress:
        progress.layer(2)
        progress.sample(20)
    last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("Layer 3/4:  60%|")
    assert "120/200 [" in last
    assert "sample 1/3]" in last


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1, 1, 5, quiet=True) as progress:
        progress.layer(0)
        progress.sample(5)
    assert capsys.readouterr().err == ""


SHOWN = """
from rain_mergekit.calibration.progress import Progress
with Progress(1, 1, 5) as progress:
    progress.layer(0)
    progress.sample(5)
"""


def test_a_terminal_without_a_size_shows_it_too() -> None:
    master, slave = pty.openpty()  # 0 x 0 until somebody sets it
    subprocess.run([sys.executable, "-c", SHOWN], stderr=slave, check=True, timeout=HANGS)
    os.close(slave)
    shown = os.read(master, 65536).decode()
    os.close(master)
    assert "sample 1/1]" in shown
