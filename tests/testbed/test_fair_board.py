"""The fair scoreboard: the same grid for every row, recipes that mergekit takes, and its page."""

from __future__ import annotations

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
from testbed.board.fair_page import page
from testbed.board.fair_rows import MOST, STARTS, FairRow, fair_rows
from testbed.board.fair_run import FairBench, next_strength, run_row
from testbed.board.recipes import ROLES, rain_config
from testbed.board.results_file import Results
from testbed.board.rivals import with_section

TRIO = ROOT / "testbed" / "trios" / "qwen-s0"
ROW = FairRow("row", "mergekit", settings={})


def numbers(both: float) -> dict[str, Any]:
    names = ("both", "plain_accuracy", "no_close", "no_thinking", "L_think")
    return {
        name: {"value": both if name == "both" else 0.5, "interval": [0.1, 0.9], "halves": []}
        for name in names
    }


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


def test_a_way_between_two_models_ends_at_the_second() -> None:
    (row,) = (row for row in fair_rows() if row.name == "slerp")
    assert list(tried(row, 0.35)) == [0.18, 0.25, 0.35, 0.5, 0.71]
    assert list(tried(row, 9.0))[STARTS:] == [1.0]


def test_every_row_has_the_same_number_of_strengths_at_first() -> None:
    rows = [row for row in fair_rows() if row.name not in ROLES]
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
    """A bench that counts what is asked of it; the best strength is one."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, float, str]] = []

    def measure(self, method: Any, strength: float, split: str, limit: int | None) -> Any:
        assert limit is None  # all prompts of either split
        self.asked.append((method.name, strength, split))
        share = 0.9 if method.name in ROLES else 1 / (1 + abs(strength - 1))
        return {"numbers": numbers(share), "bits": {}}


def test_a_row_is_chosen_on_validation_and_judged_once_on_test(tmp_path: Path) -> None:
    counted, results = Counted(), Results(tmp_path / "r.json", "trios/t-s0", "digest")
    rows = [row for row in fair_rows() if row.name in ("reasoning", "rain projection", "ties")]
    for row in rows:
        run_row(counted, results, row)
    of_rain = [asked[1:] for asked in counted.asked if asked[0] == "rain projection"]
    wanted = [(s, "validation") for s in (0.35, 0.5, 0.71, 1.0, 1.4)]
    assert of_rain == [*wanted, (1.0, "test")]
    assert ("reasoning", 0.0, "test") in counted.asked
    again = len(counted.asked)
    for row in rows:
        run_row(counted, results, row)
    assert len(counted.asked) == again
    text = page([results])
    assert "## t-s0" in text
    assert (
        "| rain projection | 1 | 5 | 100 [10, 90] | 50 [10, 90] | 50 | 50 | 0.5 [0.1, 0.9] |"
        in text
    )
    assert "| reasoning | \N{EN DASH} | \N{EN DASH} | 90 [10, 90] |" in text
    assert "At strength 1, without a search:" in text
    assert "Not measured yet: instruct; pretrained; linear;" in text


@pytest.mark.slow
def test_every_recipe_merges_in_float32_with_one_cast(tmp_path: Path) -> None:
    bench = FairBench(TRIO, tmp_path)
    for row in fair_rows():
        if row.recipe is not None:
            config = bench._config(row, 0.35)
            assert (config["dtype"], config["out_dtype"]) == ("float32", "bfloat16")
            with bench._made(config) as folder:
                assert (folder / "model.safetensors").exists(), row.name
