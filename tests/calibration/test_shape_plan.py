"""The estimate of published models from their config.json, and of stream matching's parts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import shape_table
import torch
from architectures import make
from click.testing import CliRunner
from shapes import PUBLISHED, write_shape
from tiny import FAMILIES, Tiny

from rain_mergekit.calibration.fit_rule import MATRICES
from rain_mergekit.calibration.operations import PASS_SECONDS, Operations
from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import plan
from rain_mergekit.calibration.shape_plan import plan_shape
from rain_mergekit.calibration.stream_estimate import StreamWork, estimate_streams, layer_work
from rain_mergekit.calibration.stream_shape import FittedSite, LayerShape, StreamShape
from rain_mergekit.calibration.stream_site_needs import FitNeeds
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.cli import cli
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.linalg.ridge_fit import BUFFERED_ROWS
from rain_mergekit.models.experts import experts_budget
from rain_mergekit.models.loading import LoadOptions, open_trio
from rain_mergekit.models.outline import ModelOutline
from rain_mergekit.system.speed import Rates

SETTINGS = RainSettings(reasoning_data="r", instruction_data="i")
# From the pages of the models: weights in all and for one token, in billions, and bytes on disk;
# of DeepSeek-V3, which is published with one byte a weight, in bfloat16.
KNOWN = {
    "llama-70b": (70.6, 70.6, 141e9),
    "qwen3-30b-a3b": (30.5, 3.3, 61e9),
    "qwen3-235b-a22b": (235, 22, 470e9),
    "deepseek-v3": (671, 37, 2 * 671e9),
}


@pytest.fixture(scope="module", name="outlines")
def _outlines() -> dict[str, ModelOutline]:
    return shape_table.outlines()


def test_the_page_says_what_the_plan_says(outlines: dict[str, ModelOutline]) -> None:
    """`python tests/support/shape_table.py` writes it."""
    text = shape_table.PAGE.read_text(encoding="utf-8")
    assert shape_table.BEGIN + shape_table.table(outlines) + shape_table.END in text


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_and_bytes_are_those_that_the_model_is_named_for(
    outlines: dict[str, ModelOutline], name: str
) -> None:
    outline = outlines[name]
    shape = StreamShape.of(outline)
    total, active, stored = KNOWN[name]
    assert outline.parameters / 1e9 == pytest.approx(total, rel=0.01)
    assert outline.bytes == pytest.approx(stored, rel=0.02)
    passed = sum(count * layer.active for layer, count in shape.layers)
    tables = 2 * shape.vocabulary * shape.hidden
    assert (passed + tables) / 1e9 == pytest.approx(active, rel=0.05)


def test_the_budget_decides_the_rank_and_the_file(outlines: dict[str, ModelOutline]) -> None:
    """A 70B model: each rank more takes both sides of seven weights, float32, in 80 layers."""
    shape = StreamShape.of(outlines["llama-70b"])
    a_rank = 80 * 4 * (16384 + 9216 + 9216 + 16384 + 3 * 36864)
    rank = shape.rank_within(SETTINGS)
    assert rank == int(0.1 * outlines["llama-70b"].bytes / a_rank)
    assert shape.bytes_at(rank) == rank * a_rank
    half = shape.rank_within(SETTINGS.model_copy(update={"size_budget": 0.05}))
    assert half == pytest.approx(rank / 2, abs=1)
    # beyond the 1,024 directions of keys and values only the other weights grow
    grown = shape.bytes_at(2048) - shape.bytes_at(1024)
    assert grown == 1024 * 80 * 4 * (2 * 16384 + 3 * 36864)


def test_the_sums_of_a_site_by_hand() -> None:
    """The largest step: tokens are added, the system is factored or one weight is solved."""
    site = FittedSite(width=1000, outputs=(3000, 500))
    fixed = FitNeeds(site, tokens=8000, rank=50, budget=10**9, itemsize=4, chooses=False)
    assert fixed.whole
    sums = 8 * 1000 * 4500
    results = 8 * 50 * (3000 + 1000 + 500 + 1000)
    adding = 2 * 4 * 2 * BUFFERED_ROWS * 4500 + 4 * 1000 * 3000
    solving = 8 * 2 * 1000**2 + 8 * (2 * 1000 * 3000 + 5 * 1000**2)
    assert fixed.memory == sums + max(adding, solving, 8 * 3 * 1000 * 3000) + results
    assert fixed.work.eigen == 1000**3 + 500**3
    chosen = dataclasses.replace(fixed, chooses=True)  # twice the sums, and a spectrum
    assert chosen.memory == fixed.memory + sums
    assert chosen.work.eigen == fixed.work.eigen + 1000**3


def test_too_wide_an_input_is_fitted_within_some_directions() -> None:
    site = FittedSite(width=10_000, outputs=(1000,))
    needs = FitNeeds(site, tokens=60_000, rank=50, budget=1024**3, itemsize=4)
    assert not needs.whole
    within = needs.directions
    assert MATRICES * within**2 + 12 * within * 10_000 <= 1024**3
    assert MATRICES * (within + 1) ** 2 + 12 * (within + 1) * 10_000 > 1024**3
    wide = dataclasses.replace(needs, budget=MATRICES * 10_000**2)
    assert wide.whole
    assert wide.directions == 10_000
    assert wide.memory > needs.memory


def test_seconds_are_amounts_over_rates() -> None:
    rates = Rates(products=10.0, double=5.0, eigen=2.0, memory=4.0, read=8.0, write=16.0)
    work = Operations(products=10, double=10, eigen=2, memory=8, read=8, write=32, passes=3)
    assert work.total(rates) == pytest.approx(1 + 2 + 1 + 2 + 1 + 2 + 3 * PASS_SECONDS)
    assert (work * 2 + work).computing(rates) == pytest.approx(3 * (6 + 3 * PASS_SECONDS))


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "gpt2"])
def test_the_planned_sites_are_those_that_are_fitted(tmp_path: Path, family: str) -> None:
    """Weights, and the factors' bytes, by what a calibration wrote."""
    tiny = Tiny.make(tmp_path, family) if family in FAMILIES else make(tmp_path, family)
    tiny = tiny.using(fit="streams", max_rank=3, stream_rank_share=1.0)
    trio = open_trio(tiny.config(), LoadOptions())
    layerwise = LayerwiseModel.open(trio.reasoning, trio.config, torch.float32, "cpu")
    shape = StreamShape.of(layerwise.outline)
    tiny.calibrate()
    file = CalibrationFile.open(tiny.path)
    experts = (plan.shape[0] if len(plan.shape) == 3 else 1 for plan in file.tensors.values())
    shapes = zip(file.tensors.values(), experts, strict=True)
    found = sorted(plan.shape[-2:] for plan, count in shapes for _ in range(count))
    planned = [
        (rows, site.width)
        for layer, count in shape.layers
        for site in layer.sites
        for rows in site.outputs * count * site.copies
    ]
    turned = family == "gpt2"
    assert sorted(one[::-1] if turned else one for one in planned) == found
    ranks = [file.header["tensors"][name]["fit"]["rank"] for name in file.tensors]
    factors = {key for plan in file.tensors.values() for key in (plan.a, plan.b)}
    assert shape.bytes_at(3) == sum(file.tensor(str(key)).nbytes for key in factors)
    assert set(ranks) == {3}


def test_a_mixture_counts_a_share_of_its_experts() -> None:
    site = FittedSite(4, (4,), 16)
    layer = LayerShape(parameters=100, active=20, experts=(90,), single=30, sites=(site,))
    assert layer.widest == 4
    assert layer.held(4, 2) == 400  # so few are converted at once
    large = dataclasses.replace(layer, parameters=10**9, experts=(9 * 10**8,))
    assert large.held(4, 2) == 10**8 * 4 + 9 * 10**8 * 2
    assert large.held(2, 2) == 2 * 10**9
    with experts_budget(9 * 10**8 * 2 - 1):  # of experts one alone, as stored and converted
        assert large.held(4, 2) == 10**8 * 4 + 30 * (4 + 2)
        assert large.ahead(2) == 10**8 * 2
    with experts_budget(9 * 10**8 * 2):
        assert large.ahead(2) == 10**9 * 2


def test_the_plan_counts_experts_where_they_are(tmp_path: Path) -> None:
    path, size = str(write_shape(tmp_path, "qwen3-30b-a3b")), 128 * 3 * 2048 * 768 * 2
    for fit, found in (("streams", "layers of both models"), ("projection", "layer")):
        held, apart = (
            plan_shape(path, {"fit": fit}, RunOptions(dtype=torch.bfloat16, experts_budget=budget))
            for budget in (size, size - 1)
        )
        models = 2 if fit == "streams" else 1
        left = held.memory[found] // models - size  # of one layer, without its experts
        alone = 2 * 2048 * 768 * (2 + 2)  # the larger of an expert's two weights, stored and used
        if fit == "streams":  # most memory may be taken where one model's layer is there
            assert apart.memory[found] in {left + alone, 2 * (left + alone)}
        else:
            assert held.memory[found] - apart.memory[found] == size - alone
        waiting = next(name for name in held.memory if name.startswith("next layer"))
        assert held.memory[waiting] - apart.memory[waiting] == models * size
        assert any("--experts-budget" in note for note in apart.notes) == (fit == "streams")
        assert not any("--experts-budget" in note for note in held.notes)


def test_layers_without_experts_count_where_these_are_apart(tmp_path: Path) -> None:
    """The first layers of DeepSeek-V3 have no experts, and are larger than the rest of others."""
    path = str(write_shape(tmp_path, "deepseek-v3"))
    options = RunOptions(dtype=torch.bfloat16, experts_budget=0)
    attention = 7168 * (1536 + 576) + 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168
    dense = (attention + 3 * 7168 * 18432) * 2
    for fit, models in (("streams", 2), ("projection", 1)):
        memory = plan_shape(path, {"fit": fit}, options).memory
        waiting = next(size for name, size in memory.items() if name.startswith("next layer"))
        assert waiting == pytest.approx(models * dense, rel=1e-3)
        assert "layer" not in memory or memory["layer"] < 2 * dense  # no tensor of all experts


@pytest.mark.parametrize("family", ["llama4_text", "qwen3_vl_moe", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("fit", ["streams", "projection"])
def test_the_plan_knows_which_experts_can_be_read_alone(
    tmp_path: Path, family: str, fit: str, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = make(tmp_path, family).using(fit=fit)
    held, apart = (plan(tiny.config(), RunOptions(experts_budget=one)) for one in (None, 0))
    able = family in {"qwen3_moe", "gpt_oss"}
    if fit == "projection":
        assert (apart.memory["layer"] < held.memory["layer"]) == able
    else:
        assert any("--experts-budget" in note for note in apart.notes) == able
    tiny.calibrate(experts_budget=0)
    said = "cannot be read one by one (--experts-budget)" in caplog.text
    assert said == (family == "qwen3_vl_moe")


@pytest.mark.parametrize("fit", ["streams", "projection"])
def test_the_command_explains_the_size_of_the_file(tmp_path: Path, fit: str) -> None:
    path = write_shape(tmp_path, "llama-70b")
    done = CliRunner().invoke(cli, ["estimate", "--shape", str(path), "--fit", fit])
    assert done.exit_code == 0, done.output
    for words in ("memory above the imports", "<- this plan", "time on this machine", "TFLOP/s"):
        assert words in done.output
    assert "--activation-budget" in done.output or fit == "projection"


def test_the_record_for_programs(tmp_path: Path) -> None:
    path = write_shape(tmp_path, "qwen3-30b-a3b")
    asked = ["estimate", "--shape", str(path), "--json", "--max-rank", "64"]
    done = CliRunner().invoke(cli, asked)
    assert done.exit_code == 0, done.output
    record: dict[str, Any] = json.loads(done.stdout)
    assert record["rank"] == 64
    assert record["file_by_max_rank"]["64"] == record["file_bytes"]
    assert record["seconds"]["total"] > 0
    assert record["peak"] == sum(record["memory"].values())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read as a model config"),
        ("{", "cannot be read as a model config"),
        ("[]", "it is not a JSON object"),
        ('{"model_type": "no_such"}', "not a config that is known here"),
    ],
)
def test_a_file_that_is_no_config_is_told(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    done = CliRunner().invoke(cli, ["estimate", "--shape", str(path)])
    assert done.exit_code == 1
    assert words in " ".join(done.stderr.split())
    assert str(path) in done.stderr


def test_the_plan_of_models_that_are_there_counts_their_tokens(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "qwen2").using(fit="streams")
    found = plan(tiny.config(), RunOptions())
    assert found.file is not None
    assert found.file.sizes[found.rank] == found.file_bytes
    assert found.operations.products > found.forward_flops > 0


def by_hand(layers: int, parameters: int = 96, **changes: Any) -> tuple[StreamShape, StreamWork]:
    """Two sites, of 8 and 24 features; no token is fitted within some directions."""
    sites = (FittedSite(4, (4,), before=16), FittedSite(4, (20,), before=96))
    layer = LayerShape(parameters=parameters, active=96, experts=(), sites=sites)
    shape = StreamShape(((layer, layers),), 4, 10, 2, model_bytes=400)
    work = StreamWork(own=[10], fitted=[10], others=[6], itemsize=4, rank=1, budget=10**6)
    return shape, dataclasses.replace(work, **changes)


def test_a_pass_that_ends_early_copies_what_it_reached() -> None:
    """Of the layer's 32 features the first site's pass has a quarter, the second's all."""
    (shape, work), (_, alone) = by_hand(1), by_hand(1, fitted=[0])
    layer = shape.layers[0][0]
    sites = [[one.fit(site).work.memory for site in layer.sites] for one in (work, alone)]
    found, without = layer_work(layer, shape, work), layer_work(layer, shape, alone)
    copied = found.memory - sum(sites[0]) - (without.memory - sum(sites[1]))
    assert copied == 4 * 10 * (8 / 32 + 1) * (40 * 4 + 8 * 32)


def test_the_only_layer_has_no_next_one() -> None:
    plans = [estimate_streams(*by_hand(layers, parameters=10**8)) for layers in (1, 2)]
    nexts = [{name: n for name, n in one.memory.items() if "next" in name} for one in plans]
    assert nexts == [{}, {"next layers, as stored": 2 * 10**8 * 2}]
