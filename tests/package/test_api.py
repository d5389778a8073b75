"""The public Python API: lazy, documented, and what the commands do."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import Tiny

import rain_mergekit
from rain_mergekit import api

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
HEAVY = ("torch", "transformers", "mergekit", "pydantic", "click")


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import rain_mergekit, sys; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_documented() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in rain_mergekit.__all__:
        found = getattr(rain_mergekit, name)
        assert name == "__version__" or f"`{name}" in page
        assert name == "__version__" or inspect.getdoc(found)


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'calibration_of'"):
        rain_mergekit.calibration_of  # noqa: B018


@pytest.mark.parametrize("name", ["calibrate", "estimate", "merge", "verify", "project"])
def test_docstrings_tell_arguments_and_results(name: str) -> None:
    text = inspect.getdoc(getattr(api, name)) or ""
    assert "Args:" in text
    assert "Returns:" in text


def test_calibrate_merge_and_verify_from_python(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "qwen2").using(fit="streams")
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(tiny.content()))
    assert rain_mergekit.estimate(config).peak > 0
    assert not tiny.path.exists()
    summary = rain_mergekit.calibrate(config)
    assert summary.path == tiny.path
    out = rain_mergekit.merge(config, tmp_path / "merged")
    merged, own = load_file(out / "model.safetensors"), tiny.weights("reasoning")
    changed = {name for name in own if not torch.equal(own[name], merged[name])}
    assert changed == set(rain_mergekit.CalibrationFile.open(tiny.path).tensors)
    result = rain_mergekit.verify(out, tmp_path / "reasoning", tmp_path / "reasoning.jsonl")
    assert result.drift.think.mean > 0


def test_mistakes_are_rain_errors_and_write_nothing(tmp_path: Path) -> None:
    config = tmp_path / "config.yml"
    config.write_text("merge_method: rain\nmodels: [{model: a}]\n")
    for call in (rain_mergekit.calibrate, rain_mergekit.estimate):
        with pytest.raises(rain_mergekit.RainError, match="base_model"):
            call(config)
    with pytest.raises(rain_mergekit.RainError, match="base_model"):
        rain_mergekit.merge(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_project_is_zero_on_the_protected_features() -> None:
    u = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64)).Q
    delta = torch.randn(5, 8, dtype=torch.float64)
    assert float((rain_mergekit.project(delta, u) @ u).abs().max()) < 1e-12
    v = u + 0.1 * (torch.eye(8, dtype=torch.float64) - u @ u.mT) @ torch.ones(
        8, 3, dtype=torch.float64
    )
    assert float((rain_mergekit.project(delta, u, v) @ u).abs().max()) < 1e-12
