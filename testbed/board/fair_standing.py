"""Where each row of the fair scoreboard stands on one trio: its chosen strength, its numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from testbed.board.fair_rows import CEILING, STREAMS, FairRow, fair_rows
from testbed.board.fair_run import TEST, UNCALIBRATED, best_strength, curve
from testbed.board.results_file import Entry, Results
from testbed.judging.intervals import Ratio, difference, packed, resamples, unpacked
from testbed.judging.judge import chosen, domains, strata
from testbed.puzzles.records import Record

NOT_RIVALS = ("models", "rain", "controls")  # groups


def prompt_facts(records: Sequence[Record]) -> dict[str, Any]:
    """What paired comparisons need of the test prompts, for the JSON file."""
    prompts = chosen(records, None)
    where = domains(prompts, UNCALIBRATED)
    return {
        "strata": strata(prompts),
        "asked": packed(where["asked"].astype(bool).tolist()),
        "uncalibrated": float(where["uncalibrated"].sum() / where["asked"].sum()),
    }


@dataclass(frozen=True)
class Standing:
    """One row on one trio. strength: None where there is none to choose; swept: on validation."""

    row: FairRow
    strength: float | None
    swept: Mapping[float, Any]
    entry: Entry

    def value(self, name: str) -> float:
        """A number on the test prompts."""
        return float(self.entry["numbers"][name]["value"])

    @property
    def whole(self) -> float:
        """Share of the outputs with one complete thinking block."""
        return 1 - self.value("no_close") - self.value("no_thinking")

    @property
    def at_edge(self) -> bool:
        """Whether the best strength is at an end of those tried."""
        return bool(self.swept) and self.strength in (min(self.swept), max(self.swept))


@dataclass(frozen=True)
class Trio:
    """All that is measured on one trio."""

    results: Results

    @property
    def name(self) -> str:
        return str(self.results.data["trio"])

    @cached_property
    def best(self) -> dict[str, Standing]:
        """Each row at the strength that validation prompts chose, in the order of the rows."""
        found = {}
        for row in fair_rows():
            swept = curve(self.results, row)
            if row.fixed or swept:
                strength = None if row.fixed else best_strength(swept)
                entry = self._test(row, strength or 0.0)
                if entry is not None:
                    found[row.name] = Standing(row, strength, swept, entry)
        return found

    @cached_property
    def nominal(self) -> dict[str, Standing]:
        """Each row that has a strength of its own, at it."""
        found = {}
        for name, one in self.best.items():
            strength = one.row.nominal
            entry = None if strength is None else self._test(one.row, strength)
            if entry is not None:
                found[name] = Standing(one.row, strength, one.swept, entry)
        return found

    @property
    def missing(self) -> list[str]:
        return [row.name for row in fair_rows() if row.name not in self.best]

    @property
    def ours(self) -> Standing:
        """Stream matching with its defaults at strength 1."""
        return self.nominal[STREAMS]

    @property
    def of_ceiling(self) -> float:
        return self.ours.value("both") / self.best[CEILING].value("both")

    @cached_property
    def rivals(self) -> list[Standing]:
        """Merges of others at their best, most answers right and as asked first."""
        others = [one for one in self.best.values() if one.row.group not in NOT_RIVALS]
        return sorted(others, key=lambda one: -one.value("both"))

    @property
    def projections(self) -> list[Standing]:
        """Our rows that project the task vector, at their best."""
        found = [one for one in self.best.values() if one.row.group == "rain"]
        return [one for one in found if not one.row.name.startswith(STREAMS)]

    @property
    def divergence(self) -> float:
        """Our L_think as a share of that of task arithmetic at its best strength."""
        return self.ours.value("L_think") / self.best["task_arithmetic"].value("L_think")

    def apart(self, one: Standing) -> tuple[float, float, float]:
        """How much more a row has right and as asked than ours, with its paired 95 % interval."""
        prompts = self.results.data["prompts"]
        asked = unpacked(prompts["asked"])
        first, second = (
            Ratio(unpacked(entry["bits"]["both"]) * asked, asked)
            for entry in (one.entry, self.ours.entry)
        )
        return difference(first, second, resamples(prompts["strata"]))

    def calibrated_kinds(self, one: Standing) -> float:
        """*Both* on the kinds of constraint that the calibration texts show."""
        shares = {name: one.value(name) for name in ("both", "both_uncalibrated")}
        part = float(self.results.data["prompts"]["uncalibrated"])
        return (shares["both"] - part * shares["both_uncalibrated"]) / (1 - part)

    def _test(self, row: FairRow, strength: float) -> Entry | None:
        return self.results.get(row.name, strength, TEST, None)
