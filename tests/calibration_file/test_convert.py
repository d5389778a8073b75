"""Coefficients of the published scripts: read, and merged as the scripts mean them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refused, succeed
from merging import Trio, config, make_calibration, merge

from rain_mergekit.calibration_file.published_coefficients import read_alpha
from rain_mergekit.calibration_file.reader import CalibrationFile

HEADS, LAYERS = 4, 2  # of the tiny trio: two key/value heads


def published(types: tuple[str, ...], layers: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    """A file as the scripts write it; every number differs."""
    index = [[layer, head, kind] for layer in layers for head in range(HEADS) for kind in types]
    axes = {
        "layers": list(layers),
        "heads": list(range(HEADS)),
        "types": list(types),
        "dimensions": [len(layers), HEADS, len(types)],
        "flat_index": index,
    }
    alpha = [round(0.1 + 0.07 * number, 2) for number in range(len(index))]
    return {"alpha": alpha, "axes_info": axes, "merge_types": "qkvof"}


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    return Trio.make(tmp_path_factory.mktemp("trio"))


def write(folder: Path, content: object) -> Path:
    path = folder / "alpha.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("types", [("QK",), ("Q", "K")])
def test_merge_uses_the_converted_coefficients(
    types: tuple[str, ...], trio: Trio, tmp_path: Path
) -> None:
    """Through stock mergekit, against the equation written out for every head, in float64."""
    calibration = make_calibration(trio)  # it has scales of its own, which must go
    source = calibration.write(tmp_path / "some.rain.safetensors")
    content = published(types)
    out = tmp_path / "converted.rain.safetensors"
    said = succeed("convert-alpha", write(tmp_path, content), source, "-o", out)
    assert "coefficients of 2 layers with 4 heads" in said
    merged = merge(tmp_path / "m", config(trio, out)).weights()
    weights = {role: trio.weights(role) for role in ("reasoning", "instruct", "pretrained")}
    table = {
        tuple(at): a
        for at, a in zip(content["axes_info"]["flat_index"], content["alpha"], strict=True)
    }
    for name, plan in calibration.header["tensors"].items():
        delta = weights["instruct"][name].double() - weights["pretrained"][name].double()
        delta = scaled(delta, name, table, types)
        delta -= delta @ calibration.projectors[plan["site"]]
        wanted = weights["reasoning"][name].double() + delta
        torch.testing.assert_close(merged[name].double(), wanted, rtol=1e-5, atol=1e-5)


def scaled(
    delta: torch.Tensor, name: str, table: dict[tuple[Any, ...], float], types: tuple[str, ...]
) -> torch.Tensor:
    """Head by head, as the scripts weigh the parts; key/value heads shared by two query heads."""
    layer, module = int(name.split(".")[2]), name.split(".")[-2]
    by_head = [[table[layer, head, kind] for kind in types] for head in range(HEADS)]
    first, last = [row[0] for row in by_head], [row[-1] for row in by_head]
    mean = [sum(row) / len(row) for row in by_head]
    delta = delta.clone()
    size = 8
    if module == "q_proj":
        for head in range(HEADS):
            delta[head * size : (head + 1) * size] *= first[head]
    elif module == "o_proj":
        for head in range(HEADS):
            delta[:, head * size : (head + 1) * size] *= mean[head]
    elif module in ("k_proj", "v_proj"):
        values = last if module == "k_proj" else mean
        for shared in range(2):
            pair = (values[2 * shared] + values[2 * shared + 1]) / 2
            delta[shared * size : (shared + 1) * size] *= pair
    else:
        delta *= sum(mean) / HEADS
    return delta


def test_layer_without_coefficients_is_not_merged(trio: Trio, tmp_path: Path) -> None:
    source = make_calibration(trio).write(tmp_path / "some.rain.safetensors")
    alpha = write(tmp_path, published(("QK",), layers=(1,)))
    out = tmp_path / "converted.rain.safetensors"
    assert "no coefficients for layer 0: not merged" in succeed(
        "convert-alpha", alpha, source, "-o", out
    )
    merged = merge(tmp_path / "m", config(trio, out)).weights()
    name = "model.layers.0.mlp.up_proj.weight"
    assert merged[name].equal(trio.weights("reasoning")[name])
    assert "the coefficients are those of alpha.json" in succeed("inspect", out)


def test_layer_statistics_show_them(trio: Trio, tmp_path: Path) -> None:
    made = make_calibration(trio)
    made.header["layers"] = [{"name": f"model.layers.{i}", "stats": {}} for i in range(LAYERS)]
    source = made.write(tmp_path / "some.rain.safetensors")
    out = tmp_path / "converted.rain.safetensors"
    succeed("convert-alpha", write(tmp_path, published(("QK",))), source, "-o", out)
    key = CalibrationFile.open(out).header["layers"][1]["stats"]["alpha"]
    assert CalibrationFile.open(out).tensor(key).tolist() == pytest.approx([0.38, 0.45, 0.52, 0.59])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1], "is no coefficient file"),
        ({"alpha": [1.0]}, "is no coefficient file"),
        ({"alpha": [1.0], "axes_info": {"flat_index": []}}, "two lists of the same length"),
        ({"alpha": [], "axes_info": {"flat_index": []}}, "holds no coefficients"),
        ({"alpha": ["1"], "axes_info": {"flat_index": [[0, 0, "QK"]]}}, "entry 0 must be"),
        ({"alpha": [1.0], "axes_info": {"flat_index": [[0, -1, "QK"]]}}, "entry 0 must be"),
        ({"alpha": [1.0], "axes_info": {"flat_index": [[0, 0, ["QK"]]]}}, "entry 0 must be"),
        ({"alpha": [1.0], "axes_info": {"flat_index": [[0, 0, "FFN"]]}}, "entry 0 must be"),
        ({"alpha": [1e999], "axes_info": {"flat_index": [[0, 0, "Q"]]}}, "entry 0 must be"),
    ],
)
def test_files_that_cannot_be_used(content: Any, words: str, tmp_path: Path) -> None:
    alpha = write(tmp_path, content)
    out = tmp_path / "converted.rain.safetensors"
    assert words in refused(tmp_path, "convert-alpha", alpha, "any", "-o", out)


def test_coefficients_of_another_model_are_refused(trio: Trio, tmp_path: Path) -> None:
    source = make_calibration(trio).write(tmp_path / "some.rain.safetensors")
    content = published(("QK",))
    content["axes_info"]["flat_index"][-1][1] = 4  # a fifth head: 32 rows cannot be shared
    alpha = write(tmp_path, content)
    assert read_alpha(alpha).heads == 5
    out = tmp_path / "converted.rain.safetensors"
    said = refused(tmp_path, "convert-alpha", alpha, source, "-o", out)
    assert "the coefficients are of another model" in said
    alpha.unlink()
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    write(tmp_path, published(("QK",)))
    said = refused(tmp_path, "convert-alpha", alpha, source, "-o", mine)
    assert "is not a calibration file" in said
