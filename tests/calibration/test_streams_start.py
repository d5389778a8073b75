"""Stream matching that starts between both models: the file, the merge, and who may not read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import merging
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file
from test_streams import MODULES, alone, products, run, stays_at_lambda_0
from test_streams_exact import WHOLE, agree
from test_streams_normed import FAMILIES, Normed
from tiny import Tiny
from torch import Tensor

from rain_mergekit.calibration_file.container import Entry
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.schema import parse_header
from rain_mergekit.cli import cli
from rain_mergekit.errors import RainError

START = 0.3


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    tiny = Tiny.make(tmp_path_factory.mktemp("started"), "qwen2")
    tiny = tiny.using(fit="streams", stream_start=START)
    tiny.path.with_suffix(".yml").write_text(yaml.safe_dump(alone(tiny)))
    run("calibrate", str(tiny.path.with_suffix(".yml")), "--quiet")
    return tiny


def expected(made: Tiny, changes: dict[str, Tensor]) -> dict[str, Tensor]:
    """W_R + s (W_I - W_R) + A Bᵀ for the weights with a change, float64."""
    own, tuned = (made.weights(role) for role in ("reasoning", "instruct"))
    return {
        name: own[name].double()
        + START * (tuned[name].double() - own[name].double())
        + changes[name]
        for name in changes
    }


def test_mergekit_adds_the_share_and_the_change(made: Tiny, tmp_path: Path) -> None:
    outcome = merging.merge_process(tmp_path, alone(made))
    merged, own, changes = outcome.weights(), made.weights("reasoning"), products(made)
    assert len(changes) == MODULES
    for name, weight in expected(made, changes).items():
        assert torch.allclose(merged[name].double(), weight, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(merged[name], own[name]) for name in own.keys() - changes.keys())


def test_with_lambda_0_the_reasoning_model_stays_bit_for_bit(made: Tiny, tmp_path: Path) -> None:
    assert stays_at_lambda_0(made, tmp_path)


def test_a_pretrained_model_changes_nothing(made: Tiny, tmp_path: Path) -> None:
    """The share is one of W_I - W_R, whatever else is listed."""
    three = made.using("three.rain.safetensors", fit="streams", stream_start=START)
    three.calibrate()
    two = products(made)
    assert all(torch.equal(change, two[name]) for name, change in products(three).items())
    content = {**three.content(), "dtype": "float32"}
    merged = merging.merge_process(tmp_path, content).weights()
    for name, weight in expected(made, two).items():
        assert torch.allclose(merged[name].double(), weight, rtol=1e-6, atol=1e-7)


def test_one_teacher_everywhere_takes_the_start_back(made: Tiny) -> None:
    """With the reasoning model as teacher everywhere, the streams are the reasoning model's."""
    settings = {**WHOLE, "stream_epsilon": 1e-9, "teacher_strength": 0.0, "stream_start": START}
    tiny = made.using("back.rain.safetensors", **settings)
    tiny.calibrate(dtype=torch.float64)
    layers = CalibrationFile.open(tiny.path).header["streams"]["layers"]
    assert all(error < 1e-4 for layer in layers for error in layer["fitted"].values())


def test_the_fit_through_a_norm_may_start_there_too(tmp_path: Path) -> None:
    family = "gemma3_text"
    tiny = Tiny.make(tmp_path, "qwen2", model_type=family, head_dim=12)
    tiny = tiny.using(**WHOLE, stream_start=START)
    reference = Normed(tiny)
    reference.scale = FAMILIES[family]
    agree(tiny, reference)


def test_routed_experts_stay_as_they_are(tmp_path: Path) -> None:
    """A fused weight of experts has no share; the layer's other maps have."""
    tiny = Tiny.make(tmp_path, "qwen2", **MIXTURE).using(fit="streams", stream_start=START)
    tiny.calibrate()
    entries = CalibrationFile.open(tiny.path).header["tensors"]
    routed = {name for name in entries if ".experts." in name}
    assert routed
    assert all("start" not in entries[name] for name in routed)
    assert all(entries[name]["start"] == START for name in entries.keys() - routed)


MIXTURE = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "head_dim": 12,
}


def test_the_file_asks_for_a_reader_that_knows_shares(made: Tiny) -> None:
    with safe_open(made.path, framework="pt") as file:
        assert file.metadata()["format_version"] == "6"
    header = CalibrationFile.open(made.path).header
    assert {entry["start"] for entry in header["tensors"].values()} == {START}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 1.5}, "start' must be a number from 0 to 1"),
        ({"start": -0.1}, "start' must be a number from 0 to 1"),
        ({"start": 0.5, "shape": [2, 60, 48]}, "start' must be left out, but for a matrix"),
        ({"start": "half"}, "start"),
    ],
)
def test_a_share_that_cannot_be_is_named(made: Tiny, change: dict[str, Any], message: str) -> None:
    header = json.loads(json.dumps(CalibrationFile.open(made.path).header))
    name = next(iter(header["tensors"]))
    header["tensors"][name] |= {"a": None, "b": None, **change}
    stored = load_file(made.path)
    entries = {key: Entry(t.dtype, tuple(t.shape), 0, t.nbytes) for key, t in stored.items()}
    with pytest.raises(RainError, match=message):
        parse_header(header, entries)


def test_no_adapter_of_a_fit_that_starts_between_the_models(made: Tiny, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["export-lora", str(made.path), str(tmp_path / "adapter")])
    assert result.exit_code == 1
    assert "stream_start: 0" in result.output
    assert not (tmp_path / "adapter").exists()


def test_inspect_report_and_diff_tell_the_share(made: Tiny, tmp_path: Path) -> None:
    told = "added to W_reasoning + 0.3 (W_instruct \N{MINUS SIGN} W_reasoning)"
    assert told in run("inspect", str(made.path))
    found = json.loads(run("inspect", str(made.path), "--json"))["matching"]
    assert (found["start"], found["started"], found["weights"]) == (START, MODULES, MODULES)
    page = tmp_path / "report.html"
    run("report", str(made.path), "-o", str(page))
    assert told in page.read_text()
