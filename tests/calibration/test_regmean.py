"""`merge_method: regmean`: calibrated, merged by mergekit, and compared with dense sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import succeed
from merging import merge
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import MODULES, Dense, Tiny
from torch import Tensor

from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import calibrate
from rain_mergekit.calibration.up_to_date import compare
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.errors import RainError
from rain_mergekit.models.loading import LoadOptions

EXACT = {
    "rank_by": "full",
    "max_rank": 4096,
    "regmean": {"rows": 10**6, "thinking_weight": 0.5, "epsilon": 1e-6},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny.make(tmp_path_factory.mktemp("regmean"), "qwen2")


def content(tiny: Tiny, *, plain: bool = False) -> dict[str, Any]:
    found = tiny.content(merge_method="regmean")
    if plain:
        found["models"] = found["models"][:1]
    return found


def made(tiny: Tiny, *, plain: bool = False) -> CalibrationFile:
    config = tiny.config(merge_method="regmean", models=content(tiny, plain=plain)["models"])
    calibrate(config, RunOptions(quiet=True))
    return CalibrationFile.open(tiny.path)


@pytest.fixture(scope="module")
def anchored(tiny: Tiny) -> tuple[Tiny, CalibrationFile]:
    tiny = tiny.using("anchored.rain.safetensors", **EXACT)
    return tiny, made(tiny)


def expected(tiny: Tiny, module: str, role: str) -> Tensor:
    """W_R + Δ G_I (G_I + g I + s G_R)⁻¹ from whole forward passes in float64."""
    dense, name = Dense(tiny.using()), f"{module}.weight"
    grams = {}
    for kind in ("reasoning", "instruction"):
        rows = torch.cat([inputs[module] for inputs in dense.features[kind]])
        grams[kind] = rows.mT @ rows / rows.shape[0]
    metric = grams["instruction"]
    metric = metric + 1e-6 * metric.trace() / len(metric) * torch.eye(len(metric))
    weights = {key: value[name] for key, value in dense.weights.items()}
    inverse = torch.linalg.inv(metric + 0.5 * grams["reasoning"])
    change = (weights["instruct"] - weights[role]) @ metric @ inverse
    return weights["reasoning"] + change


@pytest.mark.parametrize("plain", [False, True], ids=["anchored", "plain"])
def test_a_merge_is_the_dense_solution(
    anchored: tuple[Tiny, CalibrationFile], plain: bool, tmp_path: Path
) -> None:
    tiny, file = anchored
    if plain:
        tiny = tiny.using("plain.rain.safetensors", **EXACT)
        file = made(tiny, plain=True)
    assert file.kind == "regmean"
    found = merge(tmp_path, content(tiny, plain=plain)).weights()
    for module in MODULES:
        name = f"model.layers.1.{module}"
        wanted = expected(tiny, name, "reasoning" if plain else "pretrained")
        base = tiny.weights("reasoning")[f"{name}.weight"].double()
        error = (found[f"{name}.weight"].double() - wanted).norm() / (wanted - base).norm()
        assert float(error) < 1e-3, name
    kept = "model.layers.0.input_layernorm.weight"
    assert torch.equal(found[kept], tiny.weights("reasoning")[kept])


def merged_in_turn(tiny: Tiny) -> dict[str, Tensor]:
    """RegMean++ on the whole model in float64: each layer from what the merged ones before give."""
    dense, model = Dense(tiny.using()), tiny.model()
    modules, weights = dict(model.named_modules()), dense.weights
    found = {}
    for layer in range(dense.layers):
        names = [f"model.layers.{layer}.{module}" for module in MODULES]
        grams = {kind: grams_of(model, names, kind, dense) for kind in ("instruction", "reasoning")}
        for name in names:
            metric = grams["instruction"][name]
            metric = metric + 1e-6 * metric.trace() / len(metric) * torch.eye(len(metric))
            key = f"{name}.weight"
            keep = metric @ torch.linalg.inv(metric + 0.5 * grams["reasoning"][name])
            change = (weights["instruct"][key] - weights["pretrained"][key]) @ keep
            found[key] = modules[name].weight.data = weights["reasoning"][key] + change
    return found


def grams_of(model: Any, names: list[str], kind: str, dense: Dense) -> dict[str, Tensor]:
    """Mean second moments (d_in, d_in) of the modules' inputs over all tokens of a set."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(
            lambda _, inputs, name=name: rows[name].append(inputs[0][0].detach())
        )
        for name in names
    ]
    with torch.no_grad():
        for sample in getattr(dense, kind):
            model(input_ids=torch.tensor([list(sample.input_ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    stacked = {name: torch.cat(parts) for name, parts in rows.items()}
    return {name: x.mT @ x / len(x) for name, x in stacked.items()}


def test_merged_features_give_regmean_plus_plus(
    tiny: Tiny, anchored: tuple[Tiny, CalibrationFile], tmp_path: Path
) -> None:
    regmean = {**EXACT["regmean"], "features": "merged"}
    tiny = tiny.using("plus.rain.safetensors", **EXACT | {"regmean": regmean})
    file = made(tiny)
    found = merge(tmp_path, content(tiny)).weights()
    for name, wanted in merged_in_turn(tiny).items():
        base = tiny.weights("reasoning")[name].double()
        error = (found[name].double() - wanted).norm() / (wanted - base).norm()
        assert float(error) < 1e-3, name
    once = anchored[1]
    key = "model.layers.1.mlp.gate_proj"
    assert not torch.allclose(file.factors(key).v, once.factors(key).v, rtol=1e-2)
    assert file.header["run"]["likelihood"] == once.header["run"]["likelihood"]


def test_rank_follows_the_share_of_the_objective(
    tiny: Tiny, anchored: tuple[Tiny, CalibrationFile]
) -> None:
    full = anchored[1]
    some = made(tiny.using("some.rain.safetensors", **EXACT | {"rank_by": "response_energy"}))
    for name, site in some.sites.items():
        assert site.rank < full.sites[name].rank
        kept = some.header["sites"][name]["kept_response_energy"]
        assert 0.99 <= kept < 1


def test_the_file_belongs_to_its_method(
    anchored: tuple[Tiny, CalibrationFile], tmp_path: Path
) -> None:
    tiny, file = anchored
    version = load_metadata(file.path)["format_version"]
    assert version == "3"
    said = merge(tmp_path / "rain", content(tiny) | {"merge_method": "rain"}).error()
    assert "is for merge_method: regmean, not rain" in said
    found = compare(tiny.using(tiny.calibration).config(), LoadOptions())
    assert "it is for merge_method: regmean" in found.differences
    again = compare(tiny.config(merge_method="regmean"), LoadOptions())
    assert again.current


def load_metadata(path: str) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        return dict(opened.metadata())


def test_commands_work_on_it(tiny: Tiny, tmp_path: Path) -> None:
    tiny = tiny.using("commands.rain.safetensors", **EXACT)
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(content(tiny)))
    assert "Wrote" in succeed("merge", config, tmp_path / "merged")
    assert "merge_method: regmean" in succeed("inspect", tiny.path)
    text = (tmp_path / "merged" / "README.md").read_text()
    assert "## RegMean" in text
    assert "https://arxiv.org/abs/2212.09849" in text
    assert set(load_file(tmp_path / "merged" / "model.safetensors"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"coefficients": "normalized"}, "rain.coefficients is for merge_method: rain"),
        ({"fit": "projection"}, "rain.fit is for merge_method: rain; leave it out for regmean"),
        ({"teacher_strength": 0.5}, "rain.teacher_strength is for merge_method: rain"),
        ({"epsilon": 0.2}, "rain.epsilon is for merge_method: rain"),
        ({"rank_by": "energy"}, "rain.rank_by: energy is for merge_method: rain; regmean takes"),
        ({"regmean": {"weight": 1}}, "unknown setting 'regmean.weight'"),
    ],
)
def test_settings_of_others_are_refused(tiny: Tiny, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RainError, match=said):
        tiny.using("refused.rain.safetensors", **settings).config(merge_method="regmean")
