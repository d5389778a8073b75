"""The recipes that the weekly check of evaluation harnesses takes from docs/evaluation.md."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.harnesses import MARKER, PROMPTS, command, prepare
from rain_mergekit.system.shipped_files import TRIO


def test_the_command_of_the_page_is_run_on_the_packaged_model() -> None:
    line = command()
    assert str(TRIO / "reasoning") in line
    assert "--include_path ." in line
    assert MARKER.search(line)
    assert "think_end" not in MARKER.sub("", line)


def test_the_task_of_the_page_gets_prompts_without_a_constraint(tmp_path: Path) -> None:
    prepare(tmp_path)
    assert (tmp_path / "plain.yaml").read_text().startswith("task: plain\n")
    rows = [json.loads(line) for line in (tmp_path / "plain.jsonl").read_text().splitlines()]
    assert len(rows) == PROMPTS
    assert all(row["expected"].startswith("answer :") for row in rows)
