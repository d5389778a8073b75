"""The notebook runs from top to bottom in an empty folder, and is published without outputs."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import ROOT

import rain_mergekit

NOTEBOOK = ROOT / "notebooks" / "merge-step-by-step.ipynb"


def cells() -> list[str]:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    return ["".join(cell["source"]) for cell in code]


def test_it_uses_the_public_names_alone() -> None:
    used = {
        node.attr
        for text in cells()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "rain_mergekit"
    }
    assert used - {"__file__"} <= set(rain_mergekit.__all__)
    assert {"calibrate", "merge", "verify"} <= used


@pytest.mark.slow  # three merges of all four layers
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, text in enumerate(cells()):
        exec(compile(text, f"{NOTEBOOK.name}[{number}]", "exec"), names)  # noqa: S102
    assert "two cups two cups" in names["answers"]["merged"]
    assert all(one.verdict == "kept" for one in names["drift"][:2])
    sys.modules["matplotlib.pyplot"].close("all")
