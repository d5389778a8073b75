"""The calibration of whole models against a dense float64 computation that streams nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import merging
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, MODULES, Dense, Tiny, linear_inputs, unaccepted
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.capture.token_chunks import TokenChunks
from rain_mergekit.errors import RainError
from rain_mergekit.linalg.merged_weight import merged_weight

RHO = 0.05
UNEQUAL = {"coefficients": "closed_form", "rho": RHO, "alpha_min": 0.0, "alpha_max": 5.0}
# few rows: 15 think positions, so that the full rank stays below every width
FULL = {"rank_by": "full", "protect_thinking": 0.0, "window": 1}

Trios = dict[str, Tiny]


@pytest.fixture(scope="module", name="trios")
def _trios(tmp_path_factory: pytest.TempPathFactory) -> Trios:
    return {name: Tiny.make(tmp_path_factory.mktemp(name), name) for name in FAMILIES}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def alphas(tiny: Tiny) -> list[Tensor]:
    file = CalibrationFile.open(tiny.path)
    return [file.tensor(layer["stats"]["alpha"]).double() for layer in file.header["layers"]]


def change(tiny: Tiny, name: str) -> Tensor:
    """Delta' of the merge method's own arithmetic, before any cast: W_R is zero."""
    file = CalibrationFile.open(tiny.path)
    plan = file.tensors[name]
    parts = [tiny.weights(role)[name].float() for role in ("instruct", "pretrained")]
    assert isinstance(plan.site, str)
    factors = file.factors(plan.site)
    rows, cols = file.scale(plan.rows), file.scale(plan.cols)
    return merged_weight(
        (torch.zeros_like(parts[0]), parts[0], parts[1]), factors, (rows, cols), 1.0
    )


def projected(layers: int = 2) -> list[tuple[str, str]]:
    """(module, tensor) of everything that is merged."""
    names = [f"model.layers.{layer}.{module}" for layer in range(layers) for module in MODULES]
    return [(name, f"{name}.weight") for name in names]


# --- exactness ---------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", ["orthogonal", "oblique"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_changes_at_the_think_positions_with_unequal_coefficients(
    trios: Trios, family: str, projection: str
) -> None:
    tiny = trios[family].using(projection=projection, **FULL, **UNEQUAL)
    tiny.calibrate()
    assert all(float(alpha.std()) > 1e-3 for alpha in alphas(tiny))
    dense = Dense(tiny)
    for module, tensor in projected():
        rows = dense.rows(module, "think_positions")
        before = dense.delta(tensor) @ rows.mT
        after = change(tiny, tensor).double() @ rows.mT
        assert float(after.norm()) <= 1e-5 * float(before.norm())
        assert bool((after.norm(dim=0) <= 1e-5 * before.norm(dim=0)).all())


def test_bfloat16_rounding_is_all_that_is_left_in_a_merged_model(
    tmp_path: Path, record_property: Any
) -> None:
    """The real command in its own process; checkpoints in several shards."""
    tiny = Tiny.make(tmp_path, "qwen2", torch.bfloat16, shard="60KB").using(**FULL, **UNEQUAL)
    tiny.calibrate()
    outcome = merging.merge_process(tmp_path / "run", tiny.content())
    merged, original, dense = outcome.weights(), tiny.weights("reasoning"), Dense(tiny)
    left = []
    for module, tensor in projected():
        assert merged[tensor].dtype == torch.bfloat16
        rows = dense.rows(module, "think_positions").mT
        total = (merged[tensor].double() - original[tensor].double()) @ rows
        left.append(float(total.norm() / (dense.delta(tensor) @ rows).norm()))
        # nothing but the cast: what the cast alone would do to the unrounded weight
        exact = original[tensor].double() + change(tiny, tensor).double()
        cast = (exact.to(torch.bfloat16).double() - exact) @ rows
        assert float(total.norm()) == pytest.approx(float(cast.norm()), rel=1e-3)
    record_property("left_after_bf16", left)
    assert 1e-5 < max(left) < 2e-2
    for name in original.keys() - {tensor for _, tensor in projected()}:
        assert torch.equal(merged[name], original[name])


def test_with_an_energy_cap_the_dropped_directions_are_left_and_nothing_else(
    trios: Trios,
) -> None:
    tiny = trios["qwen2"].using(
        projection="orthogonal",
        rank_by="energy",
        rank_share=0.8,
        protect_thinking=0.0,
        reading_share=0.0,
    )
    tiny.calibrate()
    dense, file = Dense(tiny), CalibrationFile.open(tiny.path)
    for module, tensor in projected():
        rows, delta = dense.rows(module, "think_positions"), dense.delta(tensor)
        _, sigma, right = torch.linalg.svd(rows, full_matrices=False)
        energy = sigma.square()
        rank = int((energy.cumsum(0) < 0.8 * energy.sum()).sum()) + 1
        site = file.sites[str(file.tensors[tensor].site)]
        assert site.rank == rank
        assert site.kept_energy == pytest.approx(float(energy[:rank].sum() / energy.sum()), 1e-4)
        explained = (energy * (delta @ right.mT).square().sum(0))[rank:].sum()
        left = (change(tiny, tensor).double() @ rows.mT).square().sum()
        assert float(left) == pytest.approx(float(explained), rel=1e-3)


# --- streamed = dense --------------------------------------------------------------------------


@pytest.mark.parametrize("projection", ["orthogonal", "oblique"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_results_equal_the_dense_computation(
    trios: Trios, family: str, projection: str, tmp_path: Path
) -> None:
    rule = {"orthogonal": "energy", "oblique": "response_energy"}[projection]
    tiny = trios[family].using(
        projection=projection,
        rank_by=rule,
        rank_share=0.9,
        leakage_from_thinking=projection == "oblique",
        **UNEQUAL,
    )
    tiny.calibrate()
    dense, file = Dense(tiny), CalibrationFile.open(tiny.path)
    file.verify()
    for name, site in dense.sites.items():
        factors = file.factors(name)
        assert factors.u is not None
        assert factors.v is not None
        u, v = factors.u.double(), factors.v.double()
        assert relative(u @ u.mT, site.basis @ site.basis.mT) <= 1e-4
        assert relative(u @ v.mT, site.basis @ site.v.mT) <= 1e-4
        spectrum = file.tensor(str(file.sites[name].spectrum))
        count = min(len(spectrum), 20)
        assert relative(spectrum[:count], site.values[:count]) <= 1e-4
    expected = []
    for layer, (alignment, leakage) in zip(file.header["layers"], dense.statistics, strict=True):
        values = {kind: file.tensor(key) for kind, key in layer["stats"].items()}
        torch.testing.assert_close(values["alignment"], alignment, rtol=0, atol=1e-5)
        torch.testing.assert_close(values["leakage"], leakage, rtol=0, atol=1e-5)
        assert float(alignment.max()) > 0.01
        alpha = ((alignment - RHO * leakage) / (1 + leakage)).clamp(0, 5)
        torch.testing.assert_close(values["alpha"], alpha, rtol=0, atol=1e-5)
        expected.append(alpha)
    _check_merge(tiny, dense, expected, 0.5, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_at_alpha_one_equals_the_dense_one(
    trios: Trios, family: str, tmp_path: Path
) -> None:
    tiny = trios[family].using()  # every default
    tiny.calibrate()
    _check_merge(tiny, Dense(tiny), None, 1.0, tmp_path)


def _check_merge(
    tiny: Tiny, dense: Dense, alpha: Sequence[Tensor] | None, strength: float, folder: Path
) -> None:
    """mergekit's merged model against Eq. 16; what is not projected stays bit for bit."""
    content = tiny.content(parameters={"calibration": str(tiny.path), "lambda": strength})
    merged = merging.merge(folder / "run", content).weights()
    original, expected = tiny.weights("reasoning"), dense.merged(alpha, strength)
    # mergekit's own definition of Llama lists no biases: it drops them under every method
    llama = dense.config.model_type == "llama"
    lost = {name for name in original if llama and name.endswith(".bias")}
    assert set(merged) == set(original) - lost
    listed = {tensor for _, tensor in projected()}
    for name, weight in merged.items():
        if name in listed:
            moved = expected[name] - original[name].double()
            assert relative(weight.double() - original[name].double(), moved) <= 1e-4
            assert float(moved.norm()) > 1e-3 * float(expected[name].norm()) * strength
        else:
            assert torch.equal(weight, original[name])


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_by": "tolerance", "rank_tolerance": 0.2, "epsilon": 0.003},
        {"rank_by": "count", "rank_count": 7, "protect_thinking": 0.25},
        {"rank_by": "energy", "rank_share": 0.7, "protect_prompt": 2.0},
        {"rank_by": "energy", "rank_share": 0.7, "protect_response": 3.0, "window": 0},
        {"rank_by": "response_energy", "rank_share": 0.5, "epsilon": 10.0},
    ],
)
def test_every_rank_rule_and_weight_equals_the_dense_computation(
    trios: Trios, settings: dict[str, Any]
) -> None:
    tiny = trios["qwen3"].using(**settings)
    tiny.calibrate()
    file = CalibrationFile.open(tiny.path)
    for name, site in Dense(tiny).sites.items():
        factors = file.factors(name)
        assert factors.u is not None
        assert factors.v is not None
        assert relative(factors.u.double() @ factors.v.double().mT, site.basis @ site.v.mT) <= 1e-4


def test_chunks_of_tokens_see_the_same_rows(trios: Trios, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that divide no text: think positions lie in first, middle and last chunks."""
    monkeypatch.setattr(TokenChunks.__init__, "__defaults__", (7,))
    tiny = trios["llama"].using(rank_by="energy", rank_share=0.8, protect_response=0.5, **UNEQUAL)
    tiny.calibrate()
    dense, file = Dense(tiny), CalibrationFile.open(tiny.path)
    for name, site in dense.sites.items():
        u, v = file.factors(name).u, file.factors(name).v
        assert u is not None
        assert v is not None
        assert relative(u.double() @ v.double().mT, site.basis @ site.v.mT) <= 1e-4
    for layer, (alignment, _) in zip(file.header["layers"], dense.statistics, strict=True):
        found = file.tensor(layer["stats"]["alignment"])
        torch.testing.assert_close(found, alignment, rtol=0, atol=1e-5)


def test_normalised_coefficients_are_relative_to_the_mean_of_all_layers(trios: Trios) -> None:
    tiny = trios["llama"].using(coefficients="normalized", rho=0.5, alpha_min=0.2, alpha_max=1.2)
    tiny.calibrate()
    raw = [(a - 0.5 * u) / (1 + u) for a, u in Dense(tiny).statistics]
    mean = torch.cat(raw).clamp_min(0).mean()
    for found, values in zip(alphas(tiny), raw, strict=True):
        torch.testing.assert_close(found, (values / mean).clamp(0.2, 1.2), rtol=0, atol=1e-4)


# --- heads -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "order"),
    [("llama", [2, 0, 3, 1]), ("qwen2", [3, 2, 0, 1])],  # qwen2: groups swapped, and one inside
)
def test_permuted_heads_permute_coefficients_rows_and_columns(
    trios: Trios, family: str, order: list[int], tmp_path: Path
) -> None:
    settings = {"rank_by": "energy", "rank_share": 0.8, **UNEQUAL}
    tiny = trios[family].using(**settings)
    tiny.calibrate()
    config = Dense(tiny).config
    group, size = 4 // config.num_key_value_heads, 12
    kv_order = [order[index] // group for index in range(0, 4, group)]
    blocks = {"q_proj": order, "k_proj": kv_order, "v_proj": kv_order, "o_proj": order}

    def permute(name: str, tensor: Tensor) -> Tensor:
        heads = next((heads for key, heads in blocks.items() if key in name), None)
        if heads is None or name.endswith("o_proj.bias"):
            return tensor
        index = torch.cat([torch.arange(size) + head * size for head in heads])
        return tensor[:, index].contiguous() if "o_proj" in name else tensor[index].contiguous()

    other = Tiny.make(tmp_path, family).using(**settings)
    for role in ("reasoning", "instruct", "pretrained"):
        weights = {name: permute(name, value) for name, value in tiny.weights(role).items()}
        save_file(weights, tmp_path / role / "model.safetensors", metadata={"format": "pt"})
    other.calibrate()
    for before, after in zip(alphas(tiny), alphas(other), strict=True):
        torch.testing.assert_close(after, before[order], rtol=0, atol=1e-5)
    for _, tensor in projected():
        expected = permute(tensor, change(tiny, tensor)).double()
        assert relative(change(other, tensor), expected) <= 1e-4


# --- massive activations -----------------------------------------------------------------------


def test_a_planted_massive_feature_does_not_use_up_the_protection(tmp_path: Path) -> None:
    """One input feature 1000 times larger, which the task vector leaves alone."""
    tiny = Tiny.make(tmp_path, "llama")
    reasoning, instruct = tiny.weights("reasoning"), tiny.weights("instruct")
    pretrained = tiny.weights("pretrained")
    reasoning["model.layers.0.input_layernorm.weight"][3] *= 1000
    for module in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{module}.weight"
        instruct[name][:, 3] = pretrained[name][:, 3]
        reasoning[name][:, 3] = 0  # keeps the model itself in range
    for role, weights in (("reasoning", reasoning), ("instruct", instruct)):
        save_file(weights, tmp_path / role / "model.safetensors", metadata={"format": "pt"})

    def left(rule: str) -> float:
        tried = tiny.using(projection="orthogonal", rank_by=rule, rank_share=0.99, reading_share=0)
        tried.calibrate()
        dense, module = Dense(tried), "model.layers.0.self_attn.q_proj"
        rows = dense.rows(module, "think_positions").mT
        after = change(tried, f"{module}.weight").double() @ rows
        return float(after.norm() / (dense.delta(f"{module}.weight") @ rows).norm())

    assert left("energy") > 0.7
    assert left("response_energy") < 0.15


# --- the run itself ----------------------------------------------------------------------------


def files(tiny: Tiny) -> set[str]:
    return {path.name for path in tiny.folder.iterdir()}


def test_neither_a_second_run_nor_spilling_changes_a_byte(trios: Trios) -> None:
    tiny = trios["qwen2"].using(**UNEQUAL)
    tiny.config()
    tiny.path.unlink(missing_ok=True)
    before = files(tiny)
    contents = []
    for budget in (2**30, 2**30, 0, 30_000):
        tiny.calibrate(activation_budget=budget)
        contents.append(tiny.path.read_bytes())
        assert files(tiny) == before | {tiny.path.name}
    assert len(set(contents)) == 1


@contextmanager
def failing_at(layer: int, passes: int, error: BaseException) -> Iterator[None]:
    """Raise in the real layer's `passes`-th pass."""
    left = [passes]

    def hook(module: nn.Module, _args: Any) -> None:
        if type(module).__name__.endswith("DecoderLayer") and module.self_attn.layer_idx == layer:
            left[0] -= 1
            if left[0] == 0:
                raise error

    handle = nn_module.register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("budget", [2**30, 0])
def test_a_failure_leaves_nothing_behind(trios: Trios, budget: int) -> None:
    tiny = trios["llama"].using("failed.rain.safetensors", **UNEQUAL)
    tiny.config()
    before = files(tiny)
    for layer, passes in ((0, 1), (1, 8)):
        with failing_at(layer, passes, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            tiny.calibrate(activation_budget=budget)
        assert files(tiny) == before


@pytest.mark.parametrize("budget", [2**30, 0])
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(trios: Trios, budget: int) -> None:
    tiny = trios["llama"].using("whole.rain.safetensors", **UNEQUAL)
    tiny.calibrate()
    broken = trios["llama"].using(f"resumed-{budget}.rain.safetensors", **UNEQUAL)
    with failing_at(1, 5, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        broken.calibrate(snapshot_seconds=0)
    assert not broken.path.exists()
    assert broken.calibrate(activation_budget=budget).first_layer == 1
    assert broken.path.read_bytes() == tiny.path.read_bytes()
    assert not [name for name in files(broken) if name.startswith("resumed") and "work" in name]


# --- bad input ---------------------------------------------------------------------------------


def test_a_basis_of_the_whole_space_is_refused_by_name(trios: Trios) -> None:
    tiny = trios["llama"].using("none.rain.safetensors", rank_by="full")
    with pytest.raises(RainError, match=r"model\.layers\.0\.\S+: the protected basis fills all 48"):
        tiny.calibrate()
    assert not tiny.path.exists()


def test_a_rank_cap_is_reported(trios: Trios) -> None:
    summary = trios["llama"].using(rank_by="full", max_rank=10).calibrate()
    assert summary.mean_rank == 10
    (warning,) = unaccepted(summary.warnings)
    assert "rank cap" in warning


def test_a_calibration_path_that_cannot_be_written_is_refused_at_once(trios: Trios) -> None:
    tiny = trios["llama"]
    (tiny.folder / "file").touch()
    for path, message in ((tiny.folder, "is a folder"), (tiny.folder / "file" / "c", "cannot")):
        config = tiny.config(parameters={"calibration": str(path)})
        with pytest.raises(RainError, match=message):
            _run(config)


def _run(config: Any) -> None:
    from rain_mergekit.calibration.options import RunOptions  # noqa: PLC0415
    from rain_mergekit.calibration.pipeline import calibrate  # noqa: PLC0415

    calibrate(config, RunOptions(quiet=True))


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def _drop(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _reshape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _poison(name: str = "model.layers.1.mlp.up_proj.weight") -> Any:
    def fault(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights[name].view(-1)[-1] = float("nan")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return fault


def _other_family(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        text.replace('"model_type": "llama"', '"model_type": "gpt2"')
    )


def _no_config(folder: Path) -> None:
    (folder / "config.json").write_text("{ not json")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


FAULTS = [
    ("reasoning", _truncate, r"reasoning: cannot read"),
    ("pretrained", _truncate, r"pretrained: cannot read"),
    ("instruct", _drop, r"instruct: model\.layers\.1\.mlp\.up_proj\.weight is missing"),
    ("pretrained", _reshape, r"pretrained: .*up_proj.weight is \[3, 4\], expected \[64, 48\]"),
    ("reasoning", _poison("model.layers.1.mlp.down_proj.weight"), r"tensor .*1\.mlp\.down.*NaN"),
    ("reasoning", _poison("model.norm.weight"), r"reasoning: tensor model\.norm\.weight.*NaN"),
    ("reasoning", _poison("lm_head.weight"), r"reasoning: tensor lm_head\.weight contains NaN"),
    ("instruct", _poison(), r"instruct: tensor model\.layers\.1\.mlp\.up_proj.*NaN or Inf"),
    ("reasoning", _other_family, r"gpt2"),
    ("instruct", _other_family, r"instruct.* is a 'gpt2' model.*'llama'"),
    ("reasoning", _no_config, r"reasoning: cannot read its config"),
    ("pretrained", _no_weights, r"pretrained"),
    ("reasoning", _no_template, r"no chat template"),
    ("reasoning", _no_tokenizer, r"reasoning: cannot load its tokenizer"),
]


@pytest.mark.parametrize(("role", "fault", "message"), FAULTS)
def test_each_broken_model_has_one_message(
    tmp_path: Path, role: str, fault: Any, message: str
) -> None:
    tiny = Tiny.make(tmp_path, "llama").using(projection="orthogonal")
    fault(tmp_path / role)
    with pytest.raises(RainError, match=message) as caught:
        tiny.calibrate()
    assert "\n" not in str(caught.value)
    assert not tiny.path.exists()
    assert not list(tmp_path.glob("*.work"))


@pytest.mark.parametrize("role", ["reasoning", "instruct"])
def test_a_truncated_shard_of_several_has_one_message(tmp_path: Path, role: str) -> None:
    tiny = Tiny.make(tmp_path, "llama", shard="60KB").using(projection="orthogonal")
    shard = sorted((tmp_path / role).glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(RainError, match=role):
        tiny.calibrate()


def test_the_dense_reference_hooks_what_it_says(trios: Trios) -> None:
    model = trios["qwen2"].model()
    with linear_inputs(model) as inputs, torch.no_grad():
        model(input_ids=torch.tensor([[7, 8, 9]]))
    assert {module for module, _ in projected()} <= set(inputs)
