"""How many threads a command computes with: as told, else by the size of the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from rain_mergekit.system import threads
from rain_mergekit.system.threads import LARGE, threads_for

SMALL = LARGE - 1


@pytest.fixture(autouse=True)
def _three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine with three cores where nobody has asked for a number."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("size", "wanted", "expected"),
    [(SMALL, None, 1), (LARGE, None, 3), (SMALL, 2, 2), (LARGE, 2, 2)],
)
def test_the_number_is_as_told_or_by_size(size: int, wanted: int | None, expected: int) -> None:
    with threads_for(size, wanted):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_the_environment_rules(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "3")
    with threads_for(SMALL):
        assert torch.get_num_threads() == 3
    with threads_for(SMALL, 2):  # an option is nearer
        assert torch.get_num_threads() == 2


def test_it_is_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger=threads.__name__), threads_for(SMALL):
        pass
    assert f"one thread: models of hidden size {SMALL}" in caplog.text


def test_errors_inside_leave_the_number_as_it_was() -> None:
    with pytest.raises(KeyError), threads_for(SMALL):
        raise KeyError
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(("given", "expected"), [(None, "passive"), ("active", "active")])
def test_commands_wait_passively_unless_told_otherwise(given: str | None, expected: str) -> None:
    """In a process of its own: it is asked for before torch is loaded, and only then."""
    script = (
        "import json, os, sys; from click.testing import CliRunner;"
        "from rain_mergekit.cli import cli;"
        "before = 'torch' in sys.modules; CliRunner().invoke(cli, ['inspect', '--help']);"
        "print(json.dumps([before, os.environ.get('OMP_WAIT_POLICY')]))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if given:
        environment["OMP_WAIT_POLICY"] = given
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [False, expected]
