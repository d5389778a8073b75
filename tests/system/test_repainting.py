"""A bar whose time moves while a step takes long."""

from __future__ import annotations

import io
import time

import pytest
from hangs import HANGS
from tqdm import tqdm

from rain_mergekit.system import repainting


def test_a_bar_is_drawn_again_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repainting, "SECONDS", 0.001)
    screen = io.StringIO()
    limit = time.monotonic() + HANGS
    with tqdm(total=3, file=screen) as bar, repainting.repainted(bar):
        drawn = screen.getvalue().count("0/3")
        while screen.getvalue().count("0/3") < drawn + 3:
            assert time.monotonic() < limit
            time.sleep(0.001)
    assert screen.getvalue().count("\n") == 1  # and not any more after its end


def test_a_bar_that_nobody_sees_is_left_alone() -> None:
    screen = io.StringIO()
    with tqdm(total=3, file=screen, disable=True) as bar, repainting.repainted(bar):
        pass
    assert screen.getvalue() == ""
