"""Rows of the fair scoreboard: grow the grid, choose on validation prompts, judge on test."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import calibrate
from rain_mergekit.config.merge_config import read_config
from testbed.board.bench import Bench
from testbed.board.curves import Numbers
from testbed.board.fair_rows import CEILING, MOST, STARTS, FairRow
from testbed.board.methods import Method
from testbed.board.recipes import rain_config
from testbed.board.results_file import Results
from testbed.board.rivals import CalibratedRecipe, with_section
from testbed.judging.strengths import beyond_edge
from testbed.puzzles.records import read_lines, write_lines

LOG = logging.getLogger(__name__)
VALIDATION, TEST = "validation", "test"  # all prompts of both
# One of each family, the only one that changes letters; no calibration set has it.
UNCALIBRATED = ("upper", "title")


def calibrated_without(trio: Path, folder: Path) -> Path:
    """The trio once more, in links, with instruction samples of the other constraints alone."""
    folder.mkdir(parents=True)
    for path in trio.resolve().iterdir():
        (folder / path.name).symlink_to(path)
    samples = folder / "instruction.jsonl"
    records = read_lines(samples)
    samples.unlink()
    write_lines(samples, (record for record in records if not asks_for(record, UNCALIBRATED)))
    return folder


def asks_for(record: Mapping[str, Any], constraints: Sequence[str]) -> bool:
    """Whether an instruction sample has one of these constraints."""
    return any(one["instruction_id"] in constraints for one in record["related_prompt_list"])


def best_strength(found: Mapping[float, Numbers]) -> float:
    """Most answers both right and as asked; among equals the most plain ones right, then the least.

    Where no strength has any, the largest is taken, so that the grid goes on.
    """

    def merit(strength: float) -> tuple[float, ...]:
        both, plain = (found[strength][name]["value"] for name in ("both", "plain_accuracy"))
        return (both, plain, -strength) if both else (0.0, 0.0, strength)

    return max(found, key=merit)


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
    """A bench whose merges are all computed in float32 and cast to bfloat16 once.

    Strengths are chosen without divergences, which take as long as all outputs of a model.
    """

    uncalibrated = UNCALIBRATED

    def measure(
        self, method: Method, strength: float, split: str, limit: int | None
    ) -> dict[str, Any]:
        judge, start = self.judge(split, limit), time.process_time()
        if method.name == CEILING:
            found = judge.ceiling(self.trio / "reasoning", self.trio / "instruct")
        else:
            with self._model(method, strength) as (model, voice):
                found = judge.measure(model, self._voices[voice], divergent=split == TEST)
        return {**found, "cpu_seconds": round(time.process_time() - start, 1)}

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

    if row.fixed:
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
