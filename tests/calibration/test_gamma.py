"""gamma: Δ = (W_I - W_B) - gamma (W_R - W_B), against dense float64; at 1 two models are enough."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import succeed
from merging import merge
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import MODULES, Dense, Tiny
from torch import Tensor

from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import calibrate
from rain_mergekit.calibration.up_to_date import compare
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.summary import summarise
from rain_mergekit.calibration_file.writer import write_calibration
from rain_mergekit.errors import RainError
from rain_mergekit.evaluation.task_vectors import measure_task_vectors
from rain_mergekit.merge_method.single_tensors import TensorMerger
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.empty_model import empty_model
from rain_mergekit.models.loading import LoadOptions, open_checkpoint, read_model_config
from rain_mergekit.models.merge_names import merge_names
from rain_mergekit.models.model_tensors import ModelTensors
from rain_mergekit.report.model_card import section


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny.make(tmp_path_factory.mktemp("gamma"), "qwen2")


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def version(tiny: Tiny) -> str:
    with safe_open(tiny.path, framework="pt") as file:
        return str(file.metadata()["format_version"])


def merged(tiny: Tiny, folder: Path, **changes: Any) -> dict[str, Tensor]:
    return dict(merge(folder, tiny.content(**changes)).weights())


def checkpoints(tiny: Tiny) -> dict[str, Checkpoint]:
    roles = ("reasoning", "instruct", "pretrained")
    return {role: open_checkpoint(str(tiny.folder / role), LoadOptions()) for role in roles}


@pytest.mark.parametrize("gamma", [0.4, 1.0])
def test_it_is_the_dense_computation(tiny: Tiny, gamma: float, tmp_path: Path) -> None:
    """Stage 1 and the merge, with everything else at its default."""
    tiny = tiny.using(f"dense-{gamma}.rain.safetensors", gamma=gamma)
    tiny.calibrate()
    dense, file = Dense(tiny), CalibrationFile.open(tiny.path)
    assert (file.gamma, version(tiny)) == (gamma, "4")
    for name, site in dense.sites.items():
        factors = file.factors(name)
        assert relative(factors.u.double() @ factors.v.double().mT, site.basis @ site.v.mT) < 1e-4
    found, before, wanted = merged(tiny, tmp_path), tiny.weights("reasoning"), dense.merged()
    names = {f"model.layers.{i}.{m}.weight" for i in range(dense.layers) for m in MODULES}
    for name, weight in found.items():
        if name in names:
            moved = wanted[name] - before[name].double()
            assert relative(weight.double() - before[name].double(), moved) < 1e-4
        else:
            assert torch.equal(weight, before[name])


def test_at_one_two_models_are_enough(tiny: Tiny, tmp_path: Path) -> None:
    """The same bits without a pretrained model, with one, and with base_model named as one."""
    instruct, pretrained = tiny.content()["models"]
    stand_in = {**pretrained, "model": tiny.content()["base_model"]}
    ways = {
        "two": ([instruct], 1.0),
        "three": ([instruct, pretrained], 1.0),
        "proxy": ([instruct, stand_in], 0.0),
        "proxy-half": ([instruct, stand_in], 0.5),
    }
    made, results = {}, {}
    for name, (models, gamma) in ways.items():
        one = tiny.using(f"{name}.rain.safetensors", gamma=gamma)
        done = calibrate(one.config(models=models), RunOptions(quiet=True))
        said = "gamma is 1, so the task vector is instruct minus reasoning" in "".join(
            done.warnings
        )
        assert said == (gamma == 1)
        made[name] = CalibrationFile.open(one.path)
        results[name] = merged(one, tmp_path / name, models=models)
        assert version(one) == ("4" if name == "three" else "1")
    for name, file in made.items():
        assert file.gamma == (1.0 if name == "three" else 0.0)
        keys = made["two"].keys()
        assert file.keys() == keys
        assert all(torch.equal(file.tensor(key), made["two"].tensor(key)) for key in keys)
        assert all(torch.equal(w, results["two"][key]) for key, w in results[name].items())
    assert not torch.equal(
        results["two"]["model.layers.0.mlp.up_proj.weight"],
        tiny.weights("reasoning")["model.layers.0.mlp.up_proj.weight"],
    )


@pytest.mark.parametrize("gamma", [0.0, 0.99])
def test_below_one_the_pretrained_model_is_missed(tiny: Tiny, gamma: float) -> None:
    alone = tiny.content()["models"][:1]
    with pytest.raises(RainError, match="with gamma below 1 subtracts the pretrained model; list"):
        tiny.using(gamma=gamma).config(models=alone)
    with pytest.raises(RainError, match="gamma: Input should be a number, got True"):
        tiny.using(gamma=True).config(models=alone)


def test_another_gamma_asks_for_a_new_calibration(tiny: Tiny) -> None:
    tiny = tiny.using("stale.rain.safetensors")
    tiny.calibrate()
    said = compare(tiny.using(tiny.calibration, gamma=0.5).config(), LoadOptions())
    assert said.differences == ("rain.gamma is 0.5, was 0.0",)
    header = CalibrationFile.open(tiny.path).header
    assert header["settings"].pop("gamma") == 0.0
    write_calibration(tiny.path, header, load_file(tiny.path))
    assert compare(tiny.config(), LoadOptions()).current


def test_the_head_takes_it_too(tmp_path: Path) -> None:
    """In mergekit's merge, and in the merge by blocks of rows that measures before rounding."""
    name = "lm_head.weight"
    tiny = Tiny.make(tmp_path / "models", "llama", num_hidden_layers=1).with_head(name)
    path = tiny.folder / "reasoning" / "model.safetensors"
    weights = load_file(path)
    weights[name] += 0.1 * torch.randn_like(weights[name])
    save_file(weights, path, metadata={"format": "pt"})
    tiny = tiny.using(lm_head="all", gamma=0.5)
    tiny.calibrate()
    dense, file = Dense(tiny), CalibrationFile.open(tiny.path)
    rows = file.scale(file.tensors[name].rows)
    assert rows is not None
    delta = rows.double()[:, None] * dense.delta(name)
    wanted = delta @ dense.head(delta).keep
    before = tiny.weights("reasoning")[name].double()
    assert relative(merged(tiny, tmp_path / "run")[name].double() - before, wanted) < 1e-4
    models = checkpoints(tiny)
    config = read_model_config(models["reasoning"])
    model = empty_model(config, torch.float32, trust_remote_code=False)
    tensors = {role: ModelTensors.of(one, model) for role, one in models.items()}
    replay = TensorMerger(file, tensors, merge_names(config, tensors["reasoning"]), 1.0)
    assert relative(replay.tensor(name).double() - before, wanted) < 1e-4


def test_what_is_shown_of_it(tiny: Tiny) -> None:
    tiny = tiny.using("shown.rain.safetensors", gamma=0.5)
    tiny.calibrate()
    lines = [line.split() for line in succeed("inspect", tiny.path).splitlines()]
    assert ["gamma", "0.5"] in lines
    file, dense = CalibrationFile.open(tiny.path), Dense(tiny)
    card = section(tiny.config(), summarise(file))
    assert "(W_instruct − W_pretrained) − 0.5 (W_reasoning − W_pretrained)" in card  # noqa: RUF001
    for change in measure_task_vectors(file, checkpoints(tiny), 2).changes:
        module = next(m for m in MODULES if m.endswith(change.module))
        delta = dense.delta(f"model.layers.{change.layer}.{module}.weight")
        assert change.before == pytest.approx(float(delta.norm()), rel=1e-4)
        merged = delta @ dense.site_of(change.layer, module).keep
        assert change.after == pytest.approx(float(merged.norm()), rel=1e-3)
    alone = tiny.using("alone.rain.safetensors", gamma=1.0)
    calibrate(alone.config(models=tiny.content()["models"][:1]), RunOptions(quiet=True))
    two = CalibrationFile.open(alone.path)
    card = section(tiny.config(), summarise(two))
    assert "Δ = W_instruct − W_reasoning" in card  # noqa: RUF001
    page = tiny.folder / "alone.html"
    succeed("report", alone.path, "-o", page)
    for said in (card, succeed("inspect", alone.path)):
        assert "pretrained" not in said
    listed = page.read_text()
    assert ">instruct model</th>" in listed
    assert ">pretrained model</th>" not in listed


def strangers(tiny: Tiny, folder: Path, role: str) -> Tiny:
    """The same models, one of them with its weights shuffled: it shares no origin with the rest."""
    shutil.copytree(tiny.folder, folder)
    path = folder / role / "model.safetensors"
    weights = {
        name: value.flatten()[torch.randperm(value.numel())].view_as(value)
        for name, value in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    return Tiny(folder, tiny.settings)


def test_each_difference_in_it_must_be_one_of_training(tiny: Tiny, tmp_path: Path) -> None:
    other = strangers(tiny, tmp_path / "reasoning", "reasoning")
    with pytest.raises(RainError, match=r"the reasoning model .* is not tuned from it") as caught:
        other.using(gamma=0.5).calibrate()
    assert "cosine of the two 0.0" in str(caught.value).replace("-0.0", "0.0")
    with pytest.raises(RainError, match=r"the instruct model .* nor from what it was tuned from"):
        other.using(gamma=1.0).calibrate()
    other.using().calibrate()  # at 0 it makes no difference
    origin = strangers(tiny, tmp_path / "pretrained", "pretrained")
    origin.using(gamma=1.0).calibrate()  # at 1 the pretrained model takes no part
    with pytest.raises(RainError, match=r"the instruct model .* is not tuned from it"):
        origin.using(gamma=0.5).calibrate()
