"""The prepared device run, on the CPU at small shapes: the same script, up to the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.device import main
from benchmarks.device_child import measured
from benchmarks.device_models import write_model
from benchmarks.device_shapes import SHAPES, DeviceShape, write_configs, write_sets
from benchmarks.device_table import NOT_YET, table
from rain_mergekit.system.loader_choice import LOADERS, MMAP

SCRIPT = Path(__file__).parents[2] / "bench" / "device.sh"


def run(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [str(SCRIPT), str(folder), "--shapes", "small", "--device", "cpu", *more]
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_run_stops_at_its_deadline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--shapes", "small", "--device", "cpu", "--seconds", "0"]) == 3
    said = capsys.readouterr().out
    assert "the same command goes on from here" in said
    assert "| calibrate, s | not yet | not yet |" in said
    assert not (tmp_path / "7B").exists()


@pytest.mark.slow  # several processes, most of which import everything
def test_the_script_goes_on_to_the_whole_table(tmp_path: Path) -> None:
    early = run(tmp_path, "--seconds", "1")  # enough for a model, and not for a calibration
    assert early.returncode == 3, early.stderr
    written = json.loads((tmp_path / "state.json").read_text())
    assert "7B: write reasoning" in written
    assert "7B: calibrate" not in written
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "table.md").read_text()
    assert text in done.stdout
    assert NOT_YET not in text
    for row in (
        "calibrate, s",
        "mmap alone, GB/s",
        "time in forward",
        "task_arithmetic merge, s",
        "rain merge, s",
    ):
        cells = [line for line in text.splitlines() if line.startswith(f"| {row} |")]
        assert len(cells) == 1, row
        assert all(float(cell.strip(" %")) > 0 for cell in cells[0].split("|")[2:4]), cells
    found = json.loads((tmp_path / "state.json").read_text())
    for shape in SHAPES["small"]:
        record = found[f"{shape.name}: calibrate"]
        assert 0 < sum(record["phases"].values()) <= record["seconds"]
        assert record["read_bytes"] >= 2 * shape.layers * shape.layer_bytes
        readings = [found[f"{shape.name}: read {loader}"] for loader in LOADERS]
        if shape.block is None:
            assert {one["bytes"] for one in readings} == {2 * shape.layers * shape.layer_bytes}
        else:
            assert readings[1] == {}  # quantised, so never read by the library
            assert record["loader"] == MMAP
        assert not (tmp_path / shape.name).exists()  # the disk is free for the next
    assert found["7B: write reasoning"] == written["7B: write reasoning"]
    again = run(tmp_path, "--seconds", "60")
    assert again.returncode == 0
    assert "..." not in again.stdout  # nothing is done twice


def test_experts_may_be_read_one_by_one(tmp_path: Path) -> None:
    shape, made = SHAPES["small"][1], []
    for role in ("reasoning", "instruct"):
        write_model(tmp_path / role, shape, role, "cpu")
    write_sets(tmp_path, shape)
    for budget in (None, 0):
        path = tmp_path / f"{budget}.safetensors"
        write_configs(tmp_path, path)
        options = {"config": str(tmp_path / "rain.yml"), "device": "cpu", "loader": MMAP}
        options |= {"budget": 2**30, "folder": str(tmp_path), "trace": str(tmp_path / "t.json")}
        found = measured({**options, "experts_budget": budget})
        assert found["read_bytes"] > 0
        made.append(load_file(path))
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())


@pytest.mark.parametrize("shape", SHAPES["small"], ids=lambda shape: shape.name)
def test_its_models_are_whole(tmp_path: Path, shape: DeviceShape) -> None:
    for role in ("reasoning", "instruct"):
        write_model(tmp_path / role, shape, role, "cpu")
        model, told = AutoModelForCausalLM.from_pretrained(
            tmp_path / role, output_loading_info=True
        )
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]
        spread = model.get_parameter("model.layers.1.self_attn.q_proj.weight").float().std()
        assert 0.019 < spread < 0.021  # the scales of FP8 too are read
    size = sum(path.stat().st_size for path in (tmp_path / "instruct").glob("*.safetensors"))
    assert 0 <= size - shape.model_bytes < 10_000 * (shape.layers + 1)


def test_a_shard_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    shape = SHAPES["small"][0]
    assert write_model(tmp_path, shape, "reasoning", "cpu") == shape.model_bytes
    (tmp_path / "layer-00001.safetensors").unlink()
    assert write_model(tmp_path, shape, "reasoning", "cpu") == shape.layer_bytes


def test_the_published_shapes_have_their_published_sizes() -> None:
    dense, mixture = SHAPES["published"]
    assert abs(dense.model_bytes - 15.23e9) < 0.01e9  # of Qwen2.5-7B
    whole = mixture.model_bytes + (48 - mixture.layers) * mixture.layer_bytes
    assert abs(whole - 61.06e9) < 0.1e9  # of Qwen3-30B-A3B


def test_the_depth_is_what_the_disk_has_room_for() -> None:
    shape = SHAPES["published"][0]
    assert shape.within(10**12) == shape
    less = shape.within(30 * 1024**3)
    assert 1 < less.layers < shape.layers
    assert less.disk_bytes < 30 * 1024**3
    assert shape.within(0).layers == 1


def test_what_has_not_been_reached_is_named() -> None:
    text = table({}, SHAPES["published"], "a machine")
    assert text.count(NOT_YET) == 2 * (len(text.splitlines()) - 4)
