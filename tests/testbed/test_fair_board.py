"""The fair scoreboard: the same grid for every row, recipes that mergekit takes, and its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from doc_blocks import ROOT
from mergekit import merge_methods
from mergekit.config import MergeConfiguration

from rain_mergekit.config.merge_config import read_config
from rain_mergekit.merge_method.method import register
from testbed.board.curves import Numbers
from testbed.board.fair_page import PARTS, page, trio_page, with_table
from testbed.board.fair_rows import CEILING, MOST, STARTS, FairRow, fair_rows
from testbed.board.fair_run import (
    UNCALIBRATED,
    FairBench,
    asks_for,
    best_strength,
    calibrated_without,
    next_strength,
    run_row,
)
from testbed.board.fair_standing import Trio, prompt_facts
from testbed.board.recipes import rain_config
from testbed.board.results_file import Results, kept
from testbed.board.rivals import with_section
from testbed.judging.intervals import packed
from testbed.judging.judge import Judge, chosen
from testbed.models.loading import load_tokenizer
from testbed.puzzles.records import read_lines

TRIO = ROOT / "testbed" / "trios" / "qwen-s0"
ROW = FairRow("row", "mergekit", settings={})


def numbers(both: float) -> dict[str, Any]:
    shares = {"both": both, "both_held_out": 0.4, "both_uncalibrated": 0.25, "plain_accuracy": 0.5}
    found = {**shares, "no_close": 0.02, "no_thinking": 0.01, "L_think": 0.5}
    return {name: {"value": v, "interval": [0.1, 0.9], "halves": []} for name, v in found.items()}


def tried(row: FairRow, best: float) -> dict[float, Numbers]:
    """All that is measured where the share falls on both sides of one strength."""
    found: dict[float, Numbers] = {}
    while (strength := next_strength(row, found)) is not None:
        found[strength] = numbers(1 / (1 + abs(strength - best)))
    return found


def test_a_grid_grows_until_the_best_is_inside() -> None:
    assert list(tried(ROW, 0.71)) == [0.35, 0.5, 0.71, 1.0, 1.4]
    assert list(tried(ROW, 2.0))[STARTS:] == [2.0, 2.8]
    assert list(tried(ROW, 0.2))[STARTS:] == [0.25, 0.18, 0.12]
    assert len(tried(ROW, 1e9)) == MOST  # it has an end, and the page says that it is the edge


def test_a_grid_goes_on_upward_where_nothing_is_right_and_as_asked() -> None:
    found: dict[float, Numbers] = {}
    while (strength := next_strength(ROW, found)) is not None:
        found[strength] = numbers(0.3 if strength >= 4 else 0.0)
    assert list(found) == [0.35, 0.5, 0.71, 1.0, 1.4, 2.0, 2.8, 4.0, 5.7]
    backward = dict(reversed(found.items()))  # equals, in any order
    assert best_strength(found) == best_strength(backward) == 4.0


def test_a_way_between_two_models_ends_at_the_second() -> None:
    (row,) = (row for row in fair_rows() if row.name == "slerp")
    assert list(tried(row, 0.35)) == [0.18, 0.25, 0.35, 0.5, 0.71]
    assert list(tried(row, 9.0))[STARTS:] == [1.0]


def test_every_row_has_the_same_number_of_strengths_at_first() -> None:
    rows = [row for row in fair_rows() if not row.fixed]
    assert len({row.name for row in rows}) == len(rows) > 30
    for row in rows:
        found = [row.strength(k) for k in range(row.first, row.first + STARTS)]
        assert len(set(found)) == STARTS
        assert None not in found
        assert sum(how is not None for how in (row.recipe, row.calibrated, row.settings)) == 1


def test_mergekit_takes_every_recipe() -> None:
    """Its methods are there, and none of the parameters would be ignored."""
    register()
    for row in fair_rows():
        if row.recipe is None and row.calibrated is None:
            continue
        config = row.recipe(TRIO, 0.5) if row.recipe else recipe_of(row)
        found = MergeConfiguration.model_validate(config)
        known = {one.name for one in merge_methods.get(found.merge_method).spec.parameters}
        given = set(found.parameters or {}).union(*(m.parameters or {} for m in found.models or ()))
        assert given <= known, row.name
        assert all(Path(str(m.model)).is_dir() for m in found.models or ())


def recipe_of(row: FairRow) -> dict[str, Any]:
    assert row.calibrated is not None
    return row.calibrated(TRIO, Path("c.safetensors"), 0.5)


def test_every_calibration_can_be_read(tmp_path: Path) -> None:
    """Settings that the method would not read are errors, as are those of the other fit."""
    path = tmp_path / "c.yml"
    for row in fair_rows():
        if row.settings is not None:
            more = {} if row.strength_setting is None else {row.strength_setting: 0.7}
            more |= {"lm_head": "unseen"} if row.head else {}
            config = rain_config(TRIO, tmp_path / "c", 1.0, {**row.settings, **more})
        elif row.calibrated is not None:
            config = with_section(recipe_of(row), TRIO, row.section or {})
        else:
            continue
        path.write_text(yaml.safe_dump(config))
        assert read_config(path).calibration, row.name


class Counted(FairBench):
    """A bench that counts what is asked of it; the best strength is one.

    Of four prompts the first ones are right and as asked.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, float, str]] = []

    def measure(self, method: Any, strength: float, split: str, limit: int | None) -> Any:
        assert limit is None  # all prompts of either split
        self.asked.append((method.name, strength, split))
        share = SHARES.get(method.name, 0.5) / (1 + abs(strength - 1) * (strength > 0))
        right = round(4 * share)
        return {
            "numbers": numbers(share),
            "bits": {"both": packed([i < right for i in range(4)])},
        }


SHARES = {"reasoning": 0.0, CEILING: 1.0, "rain streams": 0.75, "rain projection": 1.0}
PROMPTS = [
    {"constraint": name, "held_out_wording": False} for name in ("twice", "twice", "upper", "end")
]


def measured(path: Path, names: Sequence[str]) -> tuple[Counted, Trio]:
    """A board on which these rows are measured, twice: the second time asks nothing."""
    counted, results = Counted(), Results(path, "t-s0", "digest")
    rows = [row for row in fair_rows() if row.name in names]
    results.data["prompts"] = prompt_facts(PROMPTS)
    for row in rows:
        run_row(counted, results, row)
    again = len(counted.asked)
    for row in rows:
        run_row(counted, results, row)
    assert len(counted.asked) == again
    return counted, Trio(results)


ROWS = ("reasoning", CEILING, "task_arithmetic", "rain streams", "rain projection", "wudi")


def test_a_row_is_chosen_on_validation_and_judged_once_on_test(tmp_path: Path) -> None:
    counted, _ = measured(tmp_path / "r.json", ROWS)
    of_rain = [asked[1:] for asked in counted.asked if asked[0] == "rain projection"]
    wanted = [(s, "validation") for s in (0.35, 0.5, 0.71, 1.0, 1.4)]
    assert of_rain == [*wanted, (1.0, "test")]
    assert ("reasoning", 0.0, "test") in counted.asked


def test_a_trio_page_has_each_row_beside_ours(tmp_path: Path) -> None:
    _, trio = measured(tmp_path / "r.json", ROWS)
    assert trio.of_ceiling == 0.75
    # 0.75 of all; a quarter of the prompts has the uncalibrated constraint, with 0.25
    assert trio.calibrated_kinds(trio.ours) == pytest.approx(11 / 12)
    text = trio_page(trio)
    line = (
        "| rain streams | 1 | 5 | 75 [10, 90] | \N{EN DASH} | 40 | 25 | 50 | 97 | 0.5 [0.1, 0.9] |"
    )
    assert line in text
    # all four right beside our first three, drawn again in one stratum
    assert "| rain projection | 1 | 5 | 100 [10, 90] | +25 [+0, +75] |" in text
    assert "| reasoning | \N{EN DASH} | \N{EN DASH} | 0 [10, 90] | \N{MINUS SIGN}75 [" in text
    assert "Not measured: instruct; pretrained; linear;" in text


def test_the_first_paragraph_says_what_speaks_against_us(tmp_path: Path) -> None:
    _, trio = measured(tmp_path / "r.json", ROWS)
    text = page([trio])
    said = text.split("\n\n")[2]
    assert "reaches 75 to 75 % of the ceiling on 1 trios" in said
    assert "as any rival at its best strength, or more, on 1 of them" in said
    assert (
        "our own projection, at its best strength, has more on t-s0 (`rain projection` 100" in said
    )
    assert "less than 85 % of the ceiling on t-s0 (75 %)" in said
    assert "blocks are whole on t-s0 (97)" in said
    assert "than a tenth of that of `task_arithmetic` on t-s0 (1.00)" in said
    assert "on t-s0 (25 against 92)" in said
    assert "rivals have more" not in said  # they have 50
    assert "| t-s0 | 75 [10, 90] | 100 | 75 | 50 (task_arithmetic; plain 50) |" in text


def test_the_pages_say_what_the_numbers_say() -> None:
    paths = sorted((ROOT / "testbed" / "results" / "fair").glob("*.json"))
    trios, docs = [Trio(kept(path)) for path in paths], ROOT / "docs"
    assert (docs / "results.md").read_text(encoding="utf-8") == page(trios)
    for trio in trios:
        path = docs / "results" / f"{trio.name}.md"
        assert path.read_text(encoding="utf-8") == trio_page(trio)
    for name in PARTS:
        text = (docs / name).read_text(encoding="utf-8")
        assert text == with_table(text, name, trios)


def test_no_calibration_text_has_the_constraint_left_out(tmp_path: Path) -> None:
    for name in ("qwen-s0", "llama-s0"):
        trio = ROOT / "testbed" / "trios" / name
        seen = calibrated_without(trio, tmp_path / name)
        before, after = (read_lines(folder / "instruction.jsonl") for folder in (trio, seen))
        left_out = [record for record in before if record not in after]
        assert 0 < len(left_out) == len(before) - len(after) < len(before) / 4
        assert all(asks_for(record, UNCALIBRATED) for record in left_out)
        prompts = read_lines(seen / "test.jsonl")
        assert {"upper", "title"} & {record["constraint"] for record in prompts}
        assert read_lines(seen / "reasoning.jsonl") == read_lines(trio / "reasoning.jsonl")


def test_the_ceiling_is_the_instruct_model_after_the_other_ones_thinking() -> None:
    """It thinks in every output, as the reasoning model does, and answers as it likes."""
    for name in ("qwen-s0", "llama-s0"):
        trio = ROOT / "testbed" / "trios" / name
        prompts = chosen(read_lines(trio / "test.jsonl"), 12)
        judge = Judge(trio / "reasoning", load_tokenizer(trio / "reasoning"), prompts)
        found = judge.ceiling(trio / "reasoning", trio / "instruct")["numbers"]
        alone = judge.measure(
            trio / "instruct", load_tokenizer(trio / "instruct"), divergent=False
        )["numbers"]
        assert found["no_thinking"]["value"] == found["no_close"]["value"] == 0
        assert found["thinking_right"]["value"] > 0.8
        assert alone["thinking_right"]["value"] == 0
        assert found["both"]["value"] > alone["both"]["value"] + 0.3


@pytest.mark.slow
def test_every_recipe_merges_in_float32_with_one_cast(tmp_path: Path) -> None:
    bench = FairBench(TRIO, tmp_path)
    for row in fair_rows():
        if row.recipe is not None:
            config = bench._config(row, 0.35)
            assert (config["dtype"], config["out_dtype"]) == ("float32", "bfloat16")
            with bench._made(config) as folder:
                assert (folder / "model.safetensors").exists(), row.name
