"""Rows of the fair scoreboard: grow the grid, choose on validation prompts, judge on test."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import calibrate
from rain_mergekit.config.merge_config import read_config
from testbed.board.bench import Bench
from testbed.board.curves import Numbers, best_strength
from testbed.board.fair_rows import MOST, STARTS, FairRow
from testbed.board.methods import Method
from testbed.board.recipes import ROLES, rain_config
from testbed.board.results_file import Results
from testbed.board.rivals import CalibratedRecipe, with_section
from testbed.judging.strengths import beyond_edge

LOG = logging.getLogger(__name__)
VALIDATION, TEST = "validation", "test"  # all prompts of both


def next_strength(row: FairRow, measured: Mapping[float, Numbers]) -> float | None:
    """What is to be measured next: the first strengths, then past the edge that is the best.

    None when the best is inside, or at an edge that cannot move.
    """
    starts = [s for k in range(row.first, row.first + STARTS) if (s := row.strength(k)) is not None]
    for strength in starts:
        if strength not in measured:
            return strength
    if len(measured) >= MOST:
        return None
    best, numbers = best_strength(measured), list(range(row.first - MOST, row.first + 2 * MOST))
    places = {s: k for k in numbers if (s := row.strength(k)) in measured}
    return beyond_edge(measured, best, lambda strength, way: row.strength(places[strength] + way))


class FairBench(Bench):
    """A bench whose merges are all computed in float32 and cast to bfloat16 once."""

    def _config(self, method: Method, strength: float) -> dict[str, Any]:
        if not isinstance(method, FairRow):
            raise TypeError(f"{method.name} is a row of the other scoreboard")
        found = self._recipe(method, strength)
        return {**found, "dtype": "float32", "out_dtype": "bfloat16"}

    def _recipe(self, row: FairRow, strength: float) -> dict[str, Any]:
        if row.recipe is not None:
            return row.recipe(self.trio, strength)
        if row.calibrated is not None:
            path = self._companion(row, row.calibrated)
            return row.calibrated(self.trio, path, strength)
        if row.strength_setting is not None:
            settings = {**(row.settings or {}), row.strength_setting: strength}
            return rain_config(self.trio, self.calibration(replace(row, settings=settings)), 1.0)
        return rain_config(self.trio, self.calibration(row), strength)

    def _companion(self, row: FairRow, calibrated: CalibratedRecipe) -> Path:
        """The calibration file of a companion, made once."""
        path = self._folder / f"{row.name.replace(' ', '-')}.safetensors"
        if not path.exists():
            recipe = calibrated(self.trio, path, 1.0)
            config = with_section(recipe, self.trio, row.section or {})
            path.with_suffix(".yml").write_text(yaml.safe_dump(config), encoding="utf-8")
            calibrate(read_config(path.with_suffix(".yml")), RunOptions(quiet=True))
        return path


def curve(results: Results, row: FairRow) -> dict[float, Numbers]:
    """The validation numbers of one row by strength."""
    found: dict[float, Numbers] = {}
    for entry in results.entries:
        name, strength, split, _ = entry.split(" | ")
        if (name, split) == (row.name, VALIDATION):
            found[float(strength)] = results.entries[entry]["numbers"]
    return found


def run_row(
    bench: Bench,
    results: Results,
    row: FairRow,
    limits: tuple[int | None, int | None] = (None, None),
) -> None:
    """Measure what is missing of one row; limits: validation and test prompts, None for all."""

    def measured(strength: float, split: str, limit: int | None) -> None:
        if results.get(row.name, strength, split, limit) is None:
            entry = bench.measure(row, strength, split, limit)
            results.put(entry, row.name, strength, split, limit)

    if row.name in ROLES:
        measured(0.0, TEST, limits[1])
        return
    while (strength := next_strength(row, found := curve(results, row))) is not None:
        measured(strength, VALIDATION, limits[0])
        LOG.info("%s at %g", row.name, strength)
    chosen = [best_strength(found), *([row.nominal] if row.nominal in found else [])]
    for strength in dict.fromkeys(s for s in chosen if s is not None):
        measured(strength, TEST, limits[1])


def run_all(
    bench: Bench, results: Results, wanted: list[FairRow], late: Callable[[], bool]
) -> None:
    """One row after the other, until time is up."""
    for row in wanted:
        if late():
            return
        run_row(bench, results, row)
