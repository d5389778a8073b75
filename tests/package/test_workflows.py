"""The workflows: what they may do, what they run, and on which Python."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.yml"))


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


def test_there_is_one_for_changes_one_for_every_week_and_one_for_tags() -> None:
    # YAML 1.1 reads the key `on` as true.
    assert [set(read(path)[True]) for path in WORKFLOWS] == [
        {"push", "pull_request"},
        {"schedule", "workflow_dispatch"},
        {"push"},
    ]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_they_may_read_and_nothing_else(path: Path) -> None:
    content = read(path)
    assert content["permissions"] == {"contents": "read"}
    assert not [job for job in content["jobs"].values() if "permissions" in job]
    assert all("timeout-minutes" in job for job in content["jobs"].values())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_named_by_digest_and_keep_no_credentials(path: Path) -> None:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    assert lines
    for line in lines:
        assert re.search(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line
    for step in steps(path):
        if "checkout" in step.get("uses", ""):
            assert step["with"] == {"persist-credentials": False}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_programs_that_they_run_are_there(path: Path) -> None:
    run = " ".join(step.get("run", "") for step in steps(path))
    programs = re.findall(r"\.ci/\w+", run)
    assert programs
    for name in programs:
        assert os.access(ROOT / name, os.X_OK), name


@pytest.mark.parametrize("name", ["change", "newest"])
def test_tests_run_on_the_oldest_and_the_newest_python_of_the_classifiers(name: str) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    rows = read(FOLDER / f"{name}.yml")["jobs"]["tests"]["strategy"]["matrix"]["include"]
    assert [row["python"] for row in rows] == [claimed[0], claimed[-1]]
    assert [row["dependencies"] for row in rows] == ["oldest", "newest"]
