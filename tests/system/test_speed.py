"""Rates of the machine: measured as long by the clock that is given, whichever it is."""

from __future__ import annotations

import time

import torch

from rain_mergekit.system.speed import multiply_rate


def test_a_clock_of_processor_time_is_waited_for() -> None:
    """It is slower than the wall's on a busy machine; two products would be too few."""
    seen: list[float] = []

    def slow() -> float:
        seen.append(time.perf_counter() / 4)
        return seen[-1]

    rate = multiply_rate("cpu", torch.float32, slow)
    assert 0.3 <= seen[-1] - seen[0] < 3
    assert rate > 0
