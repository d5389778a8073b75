"""The recipes that the weekly check of evaluation harnesses takes from docs/evaluation.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.harnesses import HARNESSES, PROMPTS, Harness, command, prepare

each = pytest.mark.parametrize("harness", HARNESSES.values(), ids=list(HARNESSES))


@each
def test_the_command_of_the_page_is_run_on_a_copy_of_the_packaged_model(harness: Harness) -> None:
    line = command(harness)
    assert line.startswith(f"{harness.start} ")
    assert "=./model," in line
    assert "\n" not in line
    assert " plain" in line
    assert harness.spoil(line) != line


@each
def test_the_task_of_the_page_gets_prompts_without_a_constraint(
    harness: Harness, tmp_path: Path
) -> None:
    prepare(tmp_path, harness)
    start, name = harness.task
    text = (tmp_path / name).read_text()
    assert text.startswith(start)
    if name.endswith(".py"):
        compile(text, name, "exec")
    for path in ("plain.jsonl", "prompts/test.jsonl"):
        rows = [json.loads(line) for line in (tmp_path / path).read_text().splitlines()]
        assert len(rows) == PROMPTS
        assert all(row["expected"].startswith("answer :") for row in rows)
