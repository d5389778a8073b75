"""The benchmarks' own arithmetic: a regression shows, and runs elsewhere do not count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import machine
from benchmarks.bench import Row
from benchmarks.history import change, comparable
from benchmarks.planning import WITHIN, compared
from benchmarks.table import BEGIN, END, line, page, write


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
    assert "passed" in good
    assert "2.5 x floor; detail" in good


def test_a_page_holds_the_last_run_and_nothing_of_the_one_before(tmp_path: Path) -> None:
    run = {**entry(1.0), "commit": "abc", "time": "now", "seconds": 60.0, "rates": {"flops": 1e9}}
    rows = [Row("merge", 1.2, 1.1, "12 s", 2.0), Row("others", 0.5, None)]
    path = tmp_path / "page.md"
    path.write_text(f"# Page\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    for _ in range(2):
        write(path, page(run, rows, ["on a GPU"]))
    text = path.read_text()
    assert text.startswith(f"# Page\n\n{BEGIN}\n`python -m benchmarks --quick`, commit abc")
    assert text.endswith(f"{END}\n\nAfter.\n")
    assert "old" not in text
    assert text.count("| merge | 1.2 | ≤ 1.1 | MISSED | 2.0 x floor; 12 s |") == 1
    assert "| others | 0.5 |  |  |  |" in text
    assert "| on a GPU | not run | | no GPU | |" in text
    path.write_text("no marks")
    with pytest.raises(ValueError, match="has no"):
        write(path, "x")


@pytest.mark.parametrize(("took", "verdict"), [(9.0, "passed"), (7.0, "MISSED"), (13.0, "MISSED")])
def test_a_plan_is_off_in_both_directions(took: float, verdict: str) -> None:
    """Memory is 90 of 100 bytes; of time the mean of the plans before and after counts, 10 s."""
    found = {"peak_bytes": 90 * 2**20, "planned_peak": 100 * 2**20, "processor_seconds": took}
    memory, seconds = compared("small", {**found, "planned_processor_seconds": [9.0, 11.0]})
    assert (memory.value, memory.verdict) == (pytest.approx(100 / 90), "passed")
    assert memory.detail == "90 of 100 MiB, 0.90"
    assert seconds.value == pytest.approx(max(took / 10, 10 / took))
    assert seconds.target == WITHIN
    assert seconds.verdict == verdict
    assert seconds.detail.startswith(f"{took:.1f} of 9.0 and 11.0 s")
