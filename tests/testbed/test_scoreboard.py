"""The scoreboard's pure parts: intervals, controls, tables, choices, and the page from a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doc_blocks import ROOT
from transformers import AutoModelForCausalLM

from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import calibrate
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.config.merge_config import read_config
from testbed import scoreboard
from testbed.board import across, attention, bench, controls, sections, tables
from testbed.board.curves import Row, at_gain, best_strength, rows, safe_gain, undominated
from testbed.board.methods import DEFAULT, TASK, Method, methods
from testbed.board.recipes import rain_config
from testbed.board.results_file import Results
from testbed.judging.intervals import (
    Ratio,
    described,
    difference,
    halves,
    interval,
    packed,
    resamples,
    unpacked,
)
from testbed.judging.judge import chosen, shares
from testbed.judging.scoring import Score

TRIO = ROOT / "testbed" / "trios" / "qwen-s0"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Intervals


def test_resamples_keep_the_size_of_every_stratum() -> None:
    labels = ["a"] * 5 + ["b"] * 3
    counts = resamples(labels, (0, 1), 20)
    assert counts.shape == (40, 8)
    assert (counts[:, :5].sum(1) == 5).all()
    assert (counts[:, 5:].sum(1) == 3).all()
    assert not (counts[:20] == counts[20:]).all()
    assert (counts == resamples(labels, (0, 1), 20)).all()


def test_halves_draw_without_replacement() -> None:
    counts = halves(["a"] * 6 + ["b"] * 4)
    assert counts.shape == (3, 10)
    assert set(counts.ravel()) == {0.0, 1.0}
    assert (counts[:, :6].sum(1) == 3).all()


def test_interval_of_a_share_is_the_binomial_one() -> None:
    values = np.array([1.0] * 60 + [0.0] * 40)
    ratio = Ratio(values, np.ones(100))
    low, high = interval(ratio, resamples(["a"] * 100))
    apart = 1.96 * np.sqrt(0.6 * 0.4 / 100)
    assert low == pytest.approx(0.6 - apart, abs=0.015)
    assert high == pytest.approx(0.6 + apart, abs=0.015)


def test_ratio_counts_only_its_domain() -> None:
    ratio = Ratio(np.array([3.0, 0.0, 5.0]), np.array([2.0, 0.0, 2.0]))
    assert ratio.estimate()[0] == 2.0
    assert ratio.estimate(np.array([[1.0, 9.0, 0.0]]))[0] == 1.5
    assert np.isnan(ratio.estimate(np.array([[0.0, 1.0, 0.0]]))[0])


def test_paired_difference_is_narrower_than_unpaired() -> None:
    rng = np.random.default_rng(0)
    second = (rng.random(200) < 0.5).astype(float)
    first = second.copy()
    first[:10] = 1.0
    ones, counts = np.ones(200), resamples(["a"] * 200)
    apart, low, high = difference(Ratio(first, ones), Ratio(second, ones), counts)
    assert apart == pytest.approx((first - second).mean())
    assert low <= apart <= high
    single = interval(Ratio(first, ones), counts)
    assert high - low < (single[1] - single[0]) / 2
    assert difference(Ratio(first, ones), Ratio(first, ones), counts) == (0.0, 0.0, 0.0)


def test_bits_survive_packing() -> None:
    bits = [True, False, False, True, True, False, True, False, True, True, False]
    assert unpacked(packed(bits)).tolist() == [float(bit) for bit in bits]


def test_described_leaves_out_what_no_prompt_has() -> None:
    empty = Ratio(np.zeros(4), np.zeros(4))
    found = described({"a": Ratio(np.ones(4), np.ones(4)), "b": empty}, ["x"] * 4)
    assert found == {"a": {"value": 1.0, "interval": [1.0, 1.0], "halves": [1.0] * 3}}


# Controls


@pytest.mark.parametrize(("width", "rank"), [(12, 5), (7, 7), (448, 60)])
def test_random_basis_is_orthonormal(width: int, rank: int) -> None:
    basis = controls.random_basis(width, rank, seeded())
    assert basis.shape == (width, rank)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank), atol=1e-5, rtol=0)


def test_shuffling_keeps_the_values() -> None:
    alphas = [torch.arange(4.0), torch.arange(4.0, 8.0), torch.arange(8.0, 12.0)]
    dealt = controls.shuffled(alphas, seeded())
    assert [alpha.shape for alpha in dealt] == [alpha.shape for alpha in alphas]
    assert torch.cat(dealt).sort().values.tolist() == list(range(12))
    assert torch.cat(dealt).tolist() != list(range(12))


def test_sigmoid_weights_fall_around_the_threshold() -> None:
    weights = controls.sigmoid_weights(torch.tensor([1.0, 0.01, 1e-6]), 0.1)
    assert weights[0] == pytest.approx(1.0)
    assert weights[1] == pytest.approx(0.5)
    assert weights[2] < 1e-4


def test_shrinkage_is_the_share_of_the_norm() -> None:
    delta, u = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]])
    assert controls.shrinkage(delta, u, u) == pytest.approx(0.8)
    assert controls.shrinkage(delta, None, None) == 1.0


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped models, with few calibration samples."""
    folder = tmp_path_factory.mktemp("trio") / "qwen-s0"
    folder.mkdir()
    for role in ("reasoning", "instruct", "pretrained"):
        (folder / role).symlink_to(TRIO / role)
    for name in ("reasoning", "instruction", "validation", "test"):
        lines = (TRIO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join([*lines[:8], *lines[-4:]]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def calibrated(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    config = rain_config(trio, folder / "c.safetensors", 1.0, {"coefficients": "normalized"})
    (folder / "c.yml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    calibrate(read_config(folder / "c.yml"), RunOptions(quiet=True))
    return folder / "c.safetensors"


def ranks(file: CalibrationFile) -> dict[str, int]:
    return {name: site["rank"] for name, site in file.header["sites"].items()}


def test_random_control_keeps_ranks(calibrated: Path, trio: Path, tmp_path: Path) -> None:
    path = controls.edited(calibrated, tmp_path / "e.safetensors", "random subspace", trio)
    real, made = CalibrationFile.open(calibrated), CalibrationFile.open(path)
    made.verify()
    assert ranks(made) == ranks(real)
    for site, rank in ranks(made).items():
        factors = made.factors(site)
        assert factors.u is not None
        assert factors.v is factors.u
        torch.testing.assert_close(factors.u.T @ factors.u, torch.eye(rank), atol=1e-5, rtol=0)
        assert not torch.equal(factors.u, real.factors(site).u)


@pytest.mark.parametrize("edit", ["shrunk", "no projection"])
def test_unprojected_controls_have_no_site(
    edit: str, calibrated: Path, trio: Path, tmp_path: Path
) -> None:
    file = CalibrationFile.open(controls.edited(calibrated, tmp_path / "e", edit, trio))
    assert not file.sites
    assert all(plan.site is None for plan in file.tensors.values())
    assert not [key for key in file.keys() if key.startswith("basis.")]  # noqa: SIM118
    if edit == "shrunk":
        factors = [file.scale(plan.rows) for plan in file.tensors.values()]
        # An oblique projection may lengthen a matrix a little, with few samples more.
        assert all(0 < float(f.min()) == float(f.max()) < 3 for f in factors if f is not None)


def test_head_of_a_trio_whose_head_is_its_embedding(trio: Path, tmp_path: Path) -> None:
    method = next(method for method in methods() if method.head)
    file = CalibrationFile.open(bench.Bench(trio, tmp_path).calibration(method))
    assert file.header["settings"]["lm_head"] == "unseen"
    assert file.tensors["model.embed_tokens.weight"].tokens


def test_shuffled_control_moves_coefficients(calibrated: Path, trio: Path, tmp_path: Path) -> None:
    path = controls.edited(calibrated, tmp_path / "e.safetensors", "shuffled", trio)
    real, made = CalibrationFile.open(calibrated), CalibrationFile.open(path)
    keys = [layer["stats"]["alpha"] for layer in made.header["layers"]]
    before, after = (torch.cat([file.tensor(key) for key in keys]) for file in (real, made))
    assert torch.equal(before.sort().values, after.sort().values)
    first = made.scale(made.tensors["model.layers.0.self_attn.q_proj.weight"].rows)
    assert first is not None
    torch.testing.assert_close(first.view(6, -1)[:, 0], made.tensor(keys[0]).float())
    assert ranks(made) == ranks(real)


# Choices


def row(name: str, *points: tuple[float, float, float, float]) -> Row:
    """Points of strength, followed, L_think, plain accuracy."""
    curve = {
        strength: {
            "followed": {"value": followed},
            "both": {"value": followed * accuracy},
            "L_think": {"value": cost},
            "plain_accuracy": {"value": accuracy},
            "no_close": {"value": 0.0},
            "no_thinking": {"value": 0.0},
        }
        for strength, followed, cost, accuracy in points
    }
    best = best_strength(curve)
    test = {"numbers": {**curve[best], "content_lost": {"value": 0.25}}}
    return Row(Method(name, "g"), curve, best, test, None)


def test_choices_on_curves() -> None:
    mine = row("a", (0.5, 0.2, 0.001, 1.0), (1.0, 0.6, 0.01, 0.995), (1.5, 0.8, 0.3, 0.5))
    rival = row("b", (0.5, 0.2, 0.1, 1.0), (1.0, 0.8, 0.2, 0.5))
    assert mine.best == 1.0
    assert at_gain(mine, 0.4) == pytest.approx(0.0055)
    assert at_gain(mine, 0.9) is None
    assert safe_gain(mine, row("r", (0.0, 0.0, 0.0, 1.0))) == (0.6, 1.0)
    assert undominated(mine, rival, "L_think", 1.0) == [1.0]
    assert undominated(mine, rival, "plain_accuracy", -1.0) == []


def cells(table: str, name: str, column: int = 0) -> list[str]:
    """The line of a table whose cell in that column is the name."""
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()]
    return next(line for line in lines if line[column:] and line[column] == name)


def test_means_over_training_seeds() -> None:
    trios = {
        "a-s0": {"m": row("m", (1.0, 0.5, 0.01, 1.0))},
        "a-s1": {"m": row("m", (1.0, 0.7, 0.03, 1.0)), "n": row("n", (1.0, 0.2, 0.5, 0.5))},
        "b-s0": {"m": row("m", (1.0, 0.9, 0.3, 1.0))},
    }
    text = across.summary(trios)
    first = ["60 ± 14 (2)", "100 ± 0", "25 ± 0", "0.02 ± 0.014"]  # standard deviation with n - 1
    assert cells(text, "m") == ["m", *first, "90", "100", "25", "0.3"]
    assert cells(text, "n") == ["n", "10", "50", "25", "0.5", *[tables.NONE] * 4]


def test_targets_of_a_trio() -> None:
    rows = {
        "reasoning": row("reasoning", (0.0, 0.0, 0.0, 1.0)),
        TASK: row(TASK, (0.5, 0.4, 0.1, 0.9), (1.0, 0.9, 1.0, 0.1)),
        "ties": row("ties", (0.3, 0.7, 0.0001, 0.9)),
        DEFAULT: row(DEFAULT, (1.0, 0.4, 0.004, 1.0), (1.5, 0.8, 0.02, 0.9)),
    }
    line = cells(across.targets({"a-s0": rows}), DEFAULT, 1)
    # task_arithmetic is best at 0.5: 40 % followed at 0.1, which costs the row 0.004
    none = tables.NONE
    assert line == [
        *("a-s0", DEFAULT, "1.5", "0.004", "0.04", f"0/{none}", f"10/{none}"),
        *(f"40 beside {none}", f"{TASK}, ties"),
    ]


def test_attention_equals_that_of_the_whole_model(trio: Path) -> None:
    samples = attention.held_samples(trio)[:3]
    found = attention.attention_scores(trio / "reasoning", samples)
    model = AutoModelForCausalLM.from_pretrained(
        trio / "reasoning", dtype=torch.float32, attn_implementation="eager"
    )
    expected = torch.zeros(2, len(found["alignment"]))
    for sample in samples:
        (span,) = sample.spans
        with torch.no_grad():
            ids = torch.tensor([sample.input_ids])
            layers = model(input_ids=ids, output_attentions=True).attentions
        for index, probabilities in enumerate(layers):
            paid = probabilities[0][:, :, list(span.prompt)].sum(-1).mean(0)
            for number, places in enumerate((span.related, span.unrelated)):
                expected[number, index] += paid[list(places)].mean() / len(samples)
    assert found["alignment"] == pytest.approx(expected[0].tolist(), abs=2e-4)
    assert found["leakage"] == pytest.approx(expected[1].tolist(), abs=2e-4)
    assert max(found["alignment"]) > 0.01


def test_best_strength_prefers_less_damage_among_equals() -> None:
    assert row("a", (1.0, 0.5, 0.2, 1.0), (1.5, 0.5, 0.1, 1.0)).best == 1.5


def test_methods_have_unique_names_and_edits_that_exist() -> None:
    names = [method.name for method in methods()]
    assert len(set(names)) == len(names)
    assert DEFAULT in names
    assert {method.edit for method in methods()} - {None} == set(controls.EDITS)
    assert all(method.swept(quick=True) for method in methods())


def test_limited_prompts_are_spread() -> None:
    records = [{"constraint": i % 3 != 0, "id": i} for i in range(90)]
    found = chosen(records, 10)
    assert [bool(r["constraint"]) for r in found] == [True] * 10 + [False] * 5
    assert max(r["id"] for r in found) > 70
    assert len(chosen(records, None)) == 90


def test_shares_over_their_prompts() -> None:
    records = [
        {"constraint": None, "held_out_wording": False},
        {"constraint": "upper", "held_out_wording": True},
    ]
    scores = [
        Score(True, False, False, False, False, True, False, 3),
        Score(False, True, False, True, False, False, False, 5),
    ]
    found = {name: ratio.estimate()[0] for name, ratio in shares(records, scores).items()}
    assert found["plain_accuracy"] == 1
    assert found["constrained_accuracy"] == 0
    assert found["followed"] == 1
    assert found["no_close"] == 0.5
    assert found["thinking_words"] == 4


# Tables and the page


def test_markdown_table() -> None:
    text = tables.markdown(["a", "b"], [["x", "1"]])
    assert text == "| a | b |\n| --- | ---: |\n| x | 1 |"


def test_cells() -> None:
    numbers: dict[str, Any] = {
        "both": {"value": 0.456, "interval": [0.4, 0.5]},
        "no_close": {"value": 0.02, "interval": [0, 1]},
        "L_think": {"value": 0.00012, "interval": [0.0001, 0.0123]},
    }
    assert tables.cell(numbers, "both") == "46 [40, 50]"
    assert tables.cell(numbers, "no_close") == "2"
    assert tables.cell(numbers, "L_think") == "1.2e-04 [1.0e-04, 0.012]"
    assert tables.cell(numbers, "followed") == tables.NONE
    assert tables.points(-0.051) == "\N{MINUS SIGN}5"


def test_results_of_another_trio_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    first = Results(path, "t", "one")
    first.put({"numbers": {"x": {"value": 1 / 3}}}, "m", 1.0, "test", None)
    assert Results(path, "t", "one").get("m", 1.0, "test", None) == {
        "numbers": {"x": {"value": 0.3333}}
    }
    assert Results(path, "t", "two").get("m", 1.0, "test", None) is None


def test_scoreboard_end_to_end(trio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows on a few prompts, merged for real; the second run measures nothing."""
    wanted = {"reasoning", "task_arithmetic"}
    few = [
        Method(m.name, m.group, m.strengths[-1:], m.recipe, m.settings, m.edit, m.main)
        for m in methods()
        if m.name in wanted
    ]
    for module in ("scoreboard", "board.curves", "board.page"):
        monkeypatch.setattr(f"testbed.{module}.methods", lambda: few)
    monkeypatch.setattr(scoreboard, "RESULTS", tmp_path / "results")
    page = tmp_path / "docs" / "results.md"
    command = [str(trio), "-o", str(page), "--quick", "--limit", "2"]
    monkeypatch.setattr(scoreboard, "QUICK_LIMIT", 2)
    scoreboard.main(command)
    text = page.read_text(encoding="utf-8")
    assert "| task_arithmetic |" in text
    assert "### Attention to the instruction" in text
    assert "Rows measured: 2 of 2." in text
    assert list((tmp_path / "docs" / "img").iterdir())
    monkeypatch.setattr(bench.Bench, "measure", None)  # would fail if it were called
    scoreboard.main(command)
    assert page.read_text(encoding="utf-8") == text


def test_page_from_the_shipped_numbers(tmp_path: Path) -> None:
    path = ROOT / "testbed" / "results" / "qwen-s0.json"
    trio_name = json.loads(path.read_text(encoding="utf-8"))["trio"]
    results = Results(path, trio_name, bench.digest(TRIO))
    assert results.entries, "measured on another trio"
    found = rows(results, scoreboard.VALIDATION, None, quick=False)
    complete = {row.method.name: row for row in found}
    assert {"reasoning", "task_arithmetic", DEFAULT} <= set(complete)
    text = "\n".join(sections.curves(tmp_path / "results.md", "x", complete))
    assert f"| {DEFAULT} |" in text
