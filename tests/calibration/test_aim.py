"""`merge_method: aim`: published values, a calibration against whole forward passes, and merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from calibrations import header
from commands import succeed
from mergekit import merge_methods
from mergekit.merge_methods.base import TensorGroup
from merging import merge
from safetensors.torch import load_file
from tiny import MODULES, Dense, Tiny
from torch import Tensor

from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import calibrate
from rain_mergekit.calibration.up_to_date import compare
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.writer import write_calibration
from rain_mergekit.errors import RainError
from rain_mergekit.models.loading import LoadOptions

NAME = "model.layers.0.mlp.up_proj.weight"
BASE = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
DELTA = torch.tensor([[1.0, 1.0], [-2.0, 4.0]])


def by_hand(path: Path, scale: Tensor, **entry: Any) -> str:
    made = header(0) | {"kind": "aim"}
    shape = {"site": None, "shape": [2, 2], "input_axis": -1, "rows": None, "cols": "s"}
    made["tensors"] = {NAME: shape | entry}
    write_calibration(path, made, {"s": scale})
    return str(path)


def apply(file: str, tensors: list[Tensor], **parameters: Any) -> Tensor:
    group = TensorGroup.from_tensors(tensors, base_index=0, name=NAME)
    options = {"calibration": file, **parameters}
    (result,) = merge_methods.get("aim")([group], parameters=options)
    return result


@pytest.mark.parametrize(
    ("omega", "wanted"),
    [
        (0.4, [[1.85, 2.4], [1.3, 5.6]]),
        (0.0, [[1.75, 2.0], [1.5, 4.0]]),
        (1.0, [[2.0, 3.0], [1.0, 8.0]]),
    ],
)
def test_the_published_numbers(omega: float, wanted: list[list[float]], tmp_path: Path) -> None:
    """a = (0.5, 2), so s = (0.25, 1)."""
    file = by_hand(tmp_path / "c", torch.tensor([0.25, 1.0]))
    found = apply(file, [BASE, BASE + DELTA], omega=omega)
    torch.testing.assert_close(found, torch.tensor(wanted))
    half = [tensor.bfloat16() for tensor in (BASE, BASE + DELTA)]
    assert torch.equal(apply(file, half, omega=omega), torch.tensor(wanted).bfloat16())


def test_a_transposed_weight_is_scaled_along_its_inputs(tmp_path: Path) -> None:
    file = by_hand(tmp_path / "c", torch.tensor([0.25, 1.0]), input_axis=-2)
    found = apply(file, [BASE.mT, (BASE + DELTA).mT], omega=0.4)
    torch.testing.assert_close(found, torch.tensor([[1.85, 2.4], [1.3, 5.6]]).mT)


def test_ties_is_mergekits_own_and_relaxed_after(tmp_path: Path) -> None:
    torch.manual_seed(2)
    base, scale = torch.randn(2, 2), torch.tensor([0.5, 1.0])
    others = [base + torch.randn(2, 2) for _ in range(2)]
    file = by_hand(tmp_path / "c", scale)
    found = apply(file, [base, *others], merge="ties", density=0.5, omega=0.2)
    group = TensorGroup.from_tensors([base, *others], base_index=0, name=NAME)
    options = {"weight": 1.0, "density": 0.5}
    (ties,) = merge_methods.get("ties")([group], parameters=options)
    torch.testing.assert_close(found, base + (ties - base) * (1 - 0.8 * scale))


def test_shuffled_channels_are_the_same_channels_elsewhere(tmp_path: Path) -> None:
    width = 16
    file = by_hand(tmp_path / "c", torch.linspace(0, 1, width), shape=[1, width])
    tensors = [torch.zeros(1, width), torch.ones(1, width)]
    straight = apply(file, tensors, omega=0.0)
    shuffled = [apply(file, tensors, omega=0.0, shuffle="channels") for _ in range(2)]
    assert torch.equal(*shuffled)
    assert not torch.equal(shuffled[0], straight)
    torch.testing.assert_close(shuffled[0].sort().values, straight.sort().values)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny.make(tmp_path_factory.mktemp("aim"), "qwen2").using("tiny.aim.safetensors")


def content(tiny: Tiny, **parameters: Any) -> dict[str, Any]:
    models = [
        {"model": str(tiny.folder / role), "parameters": {"role": role, "weight": weight}}
        for role, weight in (("reasoning", 1.0), ("instruct", 0.5))
    ]
    return tiny.content(
        merge_method="aim",
        base_model=str(tiny.folder / "pretrained"),
        models=models,
        parameters={"calibration": str(tiny.path), **parameters},
    )


@pytest.fixture(scope="module")
def file(tiny: Tiny) -> CalibrationFile:
    changes = {key: content(tiny)[key] for key in ("merge_method", "base_model", "models")}
    calibrate(tiny.config(**changes), RunOptions(quiet=True))
    return CalibrationFile.open(tiny.path)


def scales(tiny: Tiny) -> dict[str, Tensor]:
    """max-normalised mean |x| of the pretrained model over all tokens, from whole passes."""
    dense = Dense(tiny)
    model = tiny.model("pretrained")
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def add(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1]).abs().sum(0)
            sums[name] = sums.get(name, torch.zeros_like(rows)) + rows

        return add

    modules = dict(model.named_modules())
    names = [f"model.layers.{layer}.{module}" for layer in range(2) for module in MODULES]
    handles = [modules[name].register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        for sample in (*dense.reasoning, *dense.instruction):
            model(input_ids=torch.tensor([list(sample.input_ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {f"{name}.weight": total / total.max() for name, total in sums.items()}


def test_channels_are_those_of_the_pretrained_model(tiny: Tiny, file: CalibrationFile) -> None:
    assert file.kind == "aim"
    assert not file.sites
    wanted = scales(tiny)
    assert set(file.tensors) == set(wanted)
    for name, plan in file.tensors.items():
        found = file.scale(plan.cols)
        assert found is not None
        torch.testing.assert_close(found.double(), wanted[name], rtol=1e-4, atol=1e-6)


def test_a_merge_relaxes_task_arithmetic(tiny: Tiny, file: CalibrationFile, tmp_path: Path) -> None:
    found = merge(tmp_path, content(tiny, omega=0.2, **{"lambda": 0.7})).weights()
    weights = {role: tiny.weights(role) for role in ("pretrained", "reasoning", "instruct")}
    for name, base in weights["pretrained"].items():
        delta = (weights["reasoning"][name] - base) + 0.5 * (weights["instruct"][name] - base)
        plan = file.tensors.get(name)
        scale = None if plan is None else file.scale(plan.cols)
        factor = 1.0 if scale is None else 1 - 0.8 * scale
        torch.testing.assert_close(found[name], base + 0.7 * factor * delta)


def test_the_file_is_kept_for_its_models(tiny: Tiny, file: CalibrationFile, tmp_path: Path) -> None:
    config = content(tiny)
    changes = {key: config[key] for key in ("merge_method", "base_model", "models")}
    assert compare(tiny.config(**changes), LoadOptions()).current
    config["base_model"] = str(tiny.folder / "instruct")
    config["models"][1]["model"] = str(tiny.folder / "pretrained")
    said = merge(tmp_path / "other", config).error()
    assert "was made for another base model" in said
    rain = tiny.content(parameters={"calibration": str(file.path)})
    assert "is for merge_method: aim, not rain" in merge(tmp_path / "rain", rain).error()


def test_commands_work_on_it(tiny: Tiny, file: CalibrationFile, tmp_path: Path) -> None:
    text = succeed("inspect", file.path)
    assert "for merge_method: aim" in text
    assert "taken back at omega 0.4" in text
    done = merge(tmp_path, content(tiny))
    succeed("card", done.folder)
    card = (done.folder / "README.md").read_text()
    assert "## AIM" in card
    assert f'`"{tiny.path.name}"`' in card
    assert str(tiny.folder) not in card.split("rain-mergekit: begin")[1]


def test_one_command_calibrates_and_merges(
    tiny: Tiny, file: CalibrationFile, tmp_path: Path
) -> None:
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(content(tiny)))
    assert f"{file.path} is up to date" in succeed("merge", path, tmp_path / "merged")
    again = merge(tmp_path, content(tiny)).weights()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in again.items())


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"omega": 2}, "omega must be a finite number from 0 to 1"),
        ({"merge": "dare"}, "merge must be task_arithmetic or ties"),
        ({"calibration": ""}, "merge_method: aim needs `parameters: {calibration: PATH}`"),
        ({"alpha": 0.3}, "unknown parameter 'alpha'"),
    ],
)
def test_bad_parameters_are_one_line(
    parameters: dict[str, Any], said: str, tiny: Tiny, file: CalibrationFile, tmp_path: Path
) -> None:
    assert file.kind == "aim"
    assert said in merge(tmp_path, content(tiny, **parameters)).error()


def test_roles_are_needed_to_calibrate(tiny: Tiny) -> None:
    with pytest.raises(RainError, match="merge_method: aim needs two besides base_model"):
        tiny.config(merge_method="aim")


@pytest.mark.parametrize(
    ("settings", "owner"),
    [
        ({"stream_weights": {"prompts": 1.0}}, "rain"),
        ({"max_rank": 8}, "rain"),
        ({"regmean": {"rows": 64}}, "regmean"),
    ],
)
def test_settings_of_others_are_refused(tiny: Tiny, settings: dict[str, Any], owner: str) -> None:
    (name,) = settings
    changes = {key: content(tiny)[key] for key in ("merge_method", "base_model", "models")}
    said = f"rain.{name} is for merge_method: {owner}; leave it out for aim"
    with pytest.raises(RainError, match=said):
        tiny.using("refused.safetensors", **settings).config(**changes)
