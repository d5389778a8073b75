"""The benchmarks' own arithmetic: a regression shows, and runs elsewhere do not count."""

from __future__ import annotations

from typing import Any

from benchmarks.__main__ import line, machine
from benchmarks.history import change, comparable
from benchmarks.rows import Row


def entry(value: float, size: str = "quick", **changes: Any) -> dict[str, Any]:
    return {"size": size, "machine": {**machine(), **changes}, "rows": {"merge": value}}


def test_a_regression_shows() -> None:
    past = [entry(9.0), entry(1.0), entry(1.1), entry(0.9)]  # the median of the last three
    assert change("merge", 1.05, past) == "1.05 of before"
    assert change("merge", 1.2, past) == "1.20 of before, WORSE"
    assert change("another", 1.2, past) == ""
    assert "WORSE" in line(Row("merge", 1.2, 1.1), past)


def test_only_the_same_size_on_the_same_machine_counts() -> None:
    past = [entry(1.0), entry(1.0, size="full"), entry(1.0, gpu="another")]
    assert comparable(past, "quick", machine()) == past[:1]


def test_a_row_says_whether_it_meets_its_target_and_how_far_the_floor_is() -> None:
    assert "MISSED" in line(Row("merge", 1.2, 1.1), [])
    good = line(Row("merge", 1.05, 1.1, "detail", 2.5), [])
    assert "ok" in good
    assert "2.5 x floor; detail" in good
