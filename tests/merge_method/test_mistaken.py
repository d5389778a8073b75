"""Parameters that rain has not, given to stock mergekit: it shows a method known names only."""

from __future__ import annotations

from pathlib import Path

import pytest
from merging import Trio, config, make_calibration, merge


@pytest.mark.parametrize("name", ["lamda", "lambd", "strength", "weight", "density"])
def test_misspelt_or_foreign_parameter_is_refused(tmp_path: Path, name: str) -> None:
    trio = Trio.make(tmp_path / "models")
    path = make_calibration(trio).write(tmp_path / "c.safetensors")
    message = merge(tmp_path / "run", config(trio, path, parameters={name: 0.3})).error()
    assert f"unknown parameter {name!r}: mergekit would ignore it" in message


def test_foreign_parameter_of_one_model_is_refused(tmp_path: Path) -> None:
    trio = Trio.make(tmp_path / "models")
    path = make_calibration(trio).write(tmp_path / "c.safetensors")
    content = config(trio, path)
    content["models"][0]["parameters"]["weight"] = 0.5
    assert "unknown parameter 'weight'" in merge(tmp_path / "run", content).error()
