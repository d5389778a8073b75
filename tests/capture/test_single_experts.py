"""Experts beyond a budget are read one by one: the same bits, and never all of a layer at once."""

from __future__ import annotations

import json
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make
from click.testing import CliRunner
from quantised import FP8_SECTION, fp8_blocks, quantise
from safetensors.torch import load_file, save_file
from tiny import Tiny
from torch import Tensor

from rain_mergekit.calibration import layer, layer_passes
from rain_mergekit.cli import cli
from rain_mergekit.dequantize.plain_view import plain_view
from rain_mergekit.errors import RainError
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.empty_model import empty_model
from rain_mergekit.models.experts import expert_weights
from rain_mergekit.models.loading import LoadOptions, open_checkpoint, read_model_config
from rain_mergekit.models.model_tensors import ModelTensors

ROLES = ("reasoning", "instruct", "pretrained")
# With one tensor an expert on disk, and with one for all of a layer.
APART = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "glm4_moe", "deepseek_v3", "afmoe", "jamba")
PACKED = ("gpt_oss", "granitemoe")


def opened(folder: Path) -> tuple[ModelTensors, frozenset[str]]:
    """The model's tensors, and the names of its experts' weights."""
    checkpoint = plain_view(open_checkpoint(str(folder), LoadOptions()))
    model = empty_model(read_model_config(checkpoint), torch.float32, trust_remote_code=False)
    return ModelTensors.of(checkpoint, model), expert_weights(model)


@pytest.mark.parametrize("family", [*APART, *PACKED])
def test_an_expert_is_that_of_the_whole_weight_and_no_other_is_read(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, names = opened(make(tmp_path, family).folder / "reasoning")
    assert names
    read: list[str] = []

    def noted(self: Checkpoint, name: str, get: Any = Checkpoint.get) -> Tensor:
        read.append(name)
        result: Tensor = get(self, name)
        return result

    monkeypatch.setattr(Checkpoint, "get", noted)
    for name in names:
        assert tensors.has_single_experts(name)
        whole = tensors.get(name)
        assert tensors.stored_bytes(name) == whole.nbytes
        read.clear()
        for expert in range(len(whole)):
            assert torch.equal(tensors.expert(name, expert), whole[expert])
        if family in APART:
            assert len(read) == len(set(read)) == len(tensors.source(name).parts)
        tensors.release()


def test_experts_that_are_turned_as_a_whole_stay_together(tmp_path: Path) -> None:
    """What turns them looks at the shape of all: of one it would not know which way round it is."""
    tiny = make(tmp_path, "qwen3_vl_moe")
    tensors, names = opened(tmp_path / "reasoning")
    assert names
    assert not any(map(tensors.has_single_experts, names))
    compared(tiny, "streams")


def compared(tiny: Tiny, fit: str) -> None:
    """A calibration with all experts in memory and one without: the same file's tensors."""
    found = []
    for budget in (None, 0):
        one = tiny.using(f"{budget}.rain.safetensors", fit=fit)
        one.calibrate(experts_budget=budget)
        found.append(load_file(one.path))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("fit", ["streams", "projection"])
def test_no_layer_has_its_experts_and_no_bit_changes(
    tmp_path: Path, family: str, fit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make(tmp_path, family)
    compared(tiny, fit)
    filled: list[bool] = []
    for home in (layer, layer_passes):

        def passing(module: Any, *arguments: Any, run: Any = home.run_layer) -> Any:
            filled.extend(not p.is_meta for p in module.parameters() if p.dim() == 3)
            return run(module, *arguments)

        monkeypatch.setattr(home, "run_layer", passing)
    alive: dict[int, int] = {}
    most, expert = [0], ModelTensors.expert

    def counted(self: ModelTensors, name: str, index: int) -> Tensor:
        found = expert(self, name, index).clone()  # so that it lives as long as it is used
        alive[id(found)] = found.nbytes
        weakref.finalize(found, alive.pop, id(found), None)
        most[0] = max(most[0], sum(alive.values()))
        return found

    def refused(self: ModelTensors, name: str, get: Any = ModelTensors.get) -> Tensor:
        assert name not in names
        result: Tensor = get(self, name)
        return result

    tensors, names = opened(tiny.folder / "reasoning")
    single = max(tensors.stored_bytes(name) // tensors.expected[name][0] for name in names)
    monkeypatch.setattr(ModelTensors, "expert", counted)
    monkeypatch.setattr(ModelTensors, "get", refused)
    tiny.using("watched.rain.safetensors", fit=fit).calibrate(experts_budget=0)
    assert filled
    assert not any(filled)
    # projection: of each model of the task vector one, and of the layer that runs
    assert 0 < most[0] <= 4 * single


def test_quantised_experts_are_dequantised_one_by_one(tmp_path: Path) -> None:
    tiny = make(tmp_path, "qwen3_moe")
    for role in ("reasoning", "instruct"):
        path = tmp_path / role / "model.safetensors"
        weights = {name: value.bfloat16() for name, value in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
        quantise(tmp_path / role, FP8_SECTION, fp8_blocks)
    compared(tiny, "streams")


def test_a_damaged_expert_is_named(tmp_path: Path) -> None:
    tiny = make(tmp_path, "mixtral").using(fit="streams")
    path = tmp_path / "reasoning" / "model.safetensors"
    weights = load_file(path)
    name = next(one for one in weights if "experts.1." in one)
    weights[name][0, 0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(RainError, match=r"reasoning: tensor .*, expert 1, contains NaN or Inf"):
        tiny.calibrate(experts_budget=0)


def test_the_command_line_says_it(tmp_path: Path) -> None:
    tiny = make(tmp_path, "mixtral").using(fit="streams")
    config = tmp_path / "config.yml"
    config.write_text(json.dumps(tiny.content()))
    command = partial(CliRunner().invoke, cli, catch_exceptions=False)
    said = command(["calibrate", str(config), "--plan", "--experts-budget", "0"])
    assert "experts are read one by one whenever tokens reach them" in " ".join(said.output.split())
    result = command(["calibrate", str(config), "--experts-budget", "1KiB", "--quiet"])
    assert result.exit_code == 0, result.output
    assert tiny.path.exists()
    shape = tmp_path / "reasoning" / "config.json"
    said = command(["estimate", "--shape", str(shape), "--experts-budget", "0"])
    assert "experts are read one by one" in " ".join(said.output.split())
