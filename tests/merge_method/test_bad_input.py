"""What is wrong in a merge by a calibrated companion is one line of mergekit's command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from merging import Calibration, Trio, config, make_calibration, merge


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    return Trio.make(tmp_path_factory.mktemp("models"))


def content(trio: Trio, method: str, file: Path | None, **changes: Any) -> dict[str, Any]:
    """A right configuration, to be spoilt."""
    if method == "regmean":
        return config(trio, file, merge_method=method, **changes)
    models = [
        {"model": str(getattr(trio, role)), "parameters": {"role": role}}
        for role in ("reasoning", "instruct")
    ]
    found = config(trio, file, merge_method=method, base_model=str(trio.pretrained), models=models)
    found["parameters"] |= changes.pop("parameters", {})
    return found | changes


def file_for(trio: Trio, kind: str, folder: Path) -> Path:
    made = make_calibration(trio, project=False, scale=False)
    return Calibration(made.header | {"kind": kind}, made.tensors).write(folder / f"{kind}.file")


@pytest.mark.parametrize("method", ["regmean", "aim"])
def test_a_calibration_that_is_missing_or_of_another_method(
    trio: Trio, method: str, tmp_path: Path
) -> None:
    said = merge(tmp_path / "none", content(trio, method, None)).error()
    assert f"merge_method: {method} needs `parameters: {{calibration: PATH}}`" in said
    said = merge(tmp_path / "no number", content(trio, method, None) | absent(7)).error()
    assert "`mergekit-rain calibrate CONFIG` writes; found 7" in said
    said = merge(tmp_path / "gone", content(trio, method, tmp_path / "gone.safetensors")).error()
    assert "gone.safetensors" in said
    for kind in {"rain", "regmean", "aim"} - {method}:
        file = file_for(trio, kind, tmp_path)
        said = merge(tmp_path / kind, content(trio, method, file)).error()
        assert f"is for merge_method: {kind}, not {method}; correct `parameters.calib" in said


def absent(value: object) -> dict[str, Any]:
    return {"parameters": {"calibration": value}}


@pytest.mark.parametrize(
    ("method", "found", "wanted"),
    [
        ("regmean", "tuned", "instruct or pretrained"),
        ("aim", "pretrained", "reasoning or instruct"),
    ],
)
def test_a_role_that_the_method_does_not_know(
    trio: Trio, method: str, found: str, wanted: str, tmp_path: Path
) -> None:
    wrong = content(trio, method, file_for(trio, method, tmp_path))
    wrong["models"][0]["parameters"]["role"] = found
    said = merge(tmp_path / "run", wrong).error()
    assert f"role must be {wanted}, found '{found}'" in said


def test_models_in_the_wrong_order(trio: Trio, tmp_path: Path) -> None:
    swapped = content(trio, "regmean", file_for(trio, "regmean", tmp_path))
    first, second = (model["parameters"] for model in swapped["models"])
    first["role"], second["role"] = second["role"], first["role"]
    assert "the two models are swapped" in merge(tmp_path / "roles", swapped).error()
    file = file_for(trio, "aim", tmp_path)
    moved = content(trio, "aim", file, base_model=str(trio.instruct))
    moved["models"][1]["model"] = str(trio.pretrained)
    assert "was made for another base model" in merge(tmp_path / "base", moved).error()


@pytest.mark.parametrize("method", ["regmean", "aim"])
@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"alpha": 0.3}, "unknown parameter 'alpha': mergekit would ignore it"),
        ({"lambda": "much"}, "lambda must be a finite number, found 'much'"),
    ],
)
def test_a_parameter_that_the_method_does_not_have(
    trio: Trio, method: str, parameters: dict[str, Any], said: str, tmp_path: Path
) -> None:
    file = file_for(trio, method, tmp_path)
    assert (
        said in merge(tmp_path / "run", content(trio, method, file, parameters=parameters)).error()
    )


def test_a_model_that_is_missing_is_named_with_the_method(trio: Trio, tmp_path: Path) -> None:
    file = file_for(trio, "regmean", tmp_path)
    alone = content(trio, "regmean", file)
    del alone["models"][1]
    said = merge(tmp_path / "run", alone).error()
    assert "merge_method: regmean merges exactly two models into base_model" in said
