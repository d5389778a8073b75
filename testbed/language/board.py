"""Rows on a trio: strengths chosen on validation prompts, the best one judged on test prompts."""

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from testbed.judging.strengths import beyond_edge
from testbed.language.fits import fit_of
from testbed.language.judging import DTYPE, Judge, cached, model_digest
from testbed.language.making import configuration, digest, digest_of_sets, merged
from testbed.language.recipes import Row
from testbed.language.sets import Samples, write_choosing, write_later
from testbed.language.tuning import tune_on_sets
from testbed.models.generation import Output

LOG = logging.getLogger(__name__)
ROLES = ("pretrained", "reasoning", "instruct")
TEST = "test"  # the split of the prompts that nothing is chosen on
STEPS = 1.4  # how much further the grid goes where its last strength is the best one
MOST_STEPS = 2
SEED = 0  # of the prompts that settings are chosen on
CHOOSING_PLAIN = 32  # of these, without a constraint
RATES = (1e-4, 3e-4)  # of the fine-tune
VALIDATION_PLAIN = 16  # they only decide between strengths that are equal in both
Found = dict[str, Any]


@dataclass(frozen=True)
class Board:
    """One trio, the folder for everything made on the way, and where the rows are kept.

    quick: half of the prompts, and no strengths but those given.
    dtype: of the products while models speak.
    """

    trio: Path
    work: Path
    results: Path
    quick: bool = False
    dtype: str = DTYPE

    @cached_property
    def validation(self) -> Judge:
        return Judge(
            self.trio / "reasoning",
            self.trio / "validation.jsonl",
            divergence=False,
            plain=VALIDATION_PLAIN,
            every=1 + self.quick,
            dtype=self.dtype,
        )

    @cached_property
    def choosing(self) -> Judge:
        return self._choosing(write_choosing(SEED, self.trio))

    @cached_property
    def later(self) -> Judge:
        return self._choosing(write_later(SEED, self.trio))

    def _choosing(self, prompts: Path) -> Judge:
        return Judge(
            self.trio / "reasoning",
            prompts,
            divergence=False,
            plain=CHOOSING_PLAIN,
            dtype=self.dtype,
        )

    @cached_property
    def test(self) -> Judge:
        prompts = self.trio / "test.jsonl"
        every = 1 + self.quick
        return Judge(self.trio / "reasoning", prompts, every=every, dtype=self.dtype)

    @cached_property
    def models(self) -> dict[str, str]:
        """The digest of each of the trio's models."""
        return {role: model_digest(self.trio / role) for role in ROLES}

    def model(self, role: str, split: str = TEST) -> Found:
        """The row of one of the trio's models."""
        judge: Judge = getattr(self, split)
        key = {"model": self.models[role], "prompts": judge.digest}
        return self._kept(role, split, key, lambda: judge.measure(self.trio / role))

    def ceiling(self, split: str = TEST) -> Found:
        """The instruct model goes on after the reasoning model's own thinking."""
        judge: Judge = getattr(self, split)
        said = self.model("reasoning", split)["outputs"]
        before = [Output(text, 0, ended=True) for text in said]
        key = {"ceiling": [self.models[r] for r in ROLES[1:]], "prompts": judge.digest}
        return self._kept(
            "ceiling", split, key, lambda: judge.ceiling(self.trio / "instruct", before)
        )

    def row(self, row: Row) -> Found:
        """Choose the strength where there is a choice, then judge."""
        if len(row.strengths) == 1:
            found = self._judged(row, row.strengths[0], TEST)
            return self._write(row.slug, {**found, "minutes": _minutes([found])})
        swept = {s: self._numbers(row, s, "validation") for s in row.strengths}
        most = len(row.strengths) + (0 if self.quick else MOST_STEPS)
        while len(swept) < most and (more := further(swept, row.most)) is not None:
            swept[more] = self._numbers(row, more, "validation")
        best = max(swept, key=lambda s: _merit(swept[s]))
        brief = {str(s): _brief(n) for s, n in sorted(swept.items())}
        found = self._judged(row, best, TEST)
        minutes = _minutes([*swept.values(), found])
        return self._write(row.slug, {**found, "swept": brief, "minutes": minutes})

    def fine_tune(self, samples: Samples) -> Found:
        """A fine-tune of the reasoning model on the sets; its rate is chosen like a strength."""
        models = {rate: self._tuned(samples, rate) for rate in RATES}
        swept = {
            rate: self._seen(f"fine-tune@{rate:g}", m, "validation") for rate, m in models.items()
        }
        best = max(swept, key=lambda rate: _merit(swept[rate]))
        found = self._seen(f"fine-tune@{best:g}", models[best], TEST)
        brief = {f"{rate:g}": _brief(one) for rate, one in swept.items()}
        said = {"name": "fine-tune", "rate": best, "samples": samples.described, "swept": brief}
        return self._write("fine-tune", {**found, **said})

    def _tuned(self, samples: Samples, rate: float) -> Path:
        name = digest(
            [digest_of_sets(self.trio), samples.described, self.models["reasoning"], rate]
        )
        out = self.work / f"fine-tune-{name}"
        sets = samples.write(self.trio, self.work / f"fine-tune-{name}-sets")
        tune_on_sets(self.trio / "reasoning", out, sets, SEED, rate)
        return out

    def _seen(self, name: str, path: Path, split: str) -> Found:
        judge: Judge = getattr(self, split)
        key = {"model": model_digest(path), "prompts": judge.digest}
        file = self.work / "rows" / f"{name}.{split}.json"
        return cached(file, key, lambda: judge.measure(path))

    def attempt(self, row: Row, split: str = "choosing") -> Found:
        """A row on prompts that settings may be chosen on, never on the test prompts."""
        found = self._judged(row, row.strengths[0], split)
        return self._write(f"{split}/{row.slug}", {**found, "samples": row.samples.described})

    def _judged(self, row: Row, strength: float, split: str) -> Found:
        """The numbers, and what they are of."""
        said = {"name": row.name, "rain": dict(row.rain), "strength": strength}
        return {**self._numbers(row, strength, split), **said}

    def _numbers(self, row: Row, strength: float, split: str) -> Found:
        judge: Judge = getattr(self, split)
        key = self._key(row, strength, judge)

        def make() -> Found:
            start = time.monotonic()
            config = configuration(row, strength, self.trio, self.work)
            out = merged(config, self.work / f"merged-{os.getpid()}")
            making = time.monotonic() - start
            found = judge.measure(out)
            seconds = {"making": round(making), "judging": round(time.monotonic() - start - making)}
            LOG.info("%s at %g, %s: %s, %s", row.name, strength, split, _brief(found), seconds)
            made = {**found, "seconds": seconds, "model": model_digest(out)}
            fit = fit_of(Path(config["parameters"]["calibration"])) if row.rain else None
            return {**made, "fit": fit} if fit else made

        return cached(self.work / "rows" / f"{row.slug}@{strength:g}.{split}.json", key, make)

    def _key(self, row: Row, strength: float, judge: Judge) -> Found:
        recipe = row.recipe(Path(), strength)
        sets = digest_of_sets(self.trio) if row.rain else ""
        described = digest([recipe, dict(row.rain), sets, row.samples.described])
        return {"recipe": described, "models": self.models, "prompts": judge.digest}

    def _kept(self, name: str, split: str, key: Found, make: Any) -> Found:
        place = name if split == TEST else f"{split}/{name}"

        def timed() -> Found:
            start = time.monotonic()
            return {**make(), "seconds": {"judging": round(time.monotonic() - start)}}

        found = cached(self.work / "rows" / f"{place}.json", key, timed)
        LOG.info("%s: %s", place, _brief(found))
        self._write(place, {**found, "name": name, "minutes": _minutes([found])})
        return found

    def _write(self, slug: str, found: Mapping[str, Any]) -> Found:
        """The row without the texts, for the repository."""
        kept = {name: value for name, value in found.items() if name != "outputs"}
        path = self.results / f"{slug}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(kept, indent=1, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
        return kept


def _minutes(measured: Sequence[Found]) -> float:
    """What a row took with all its strengths: merging, calibrations that were new, judging."""
    return round(sum(sum(found["seconds"].values()) for found in measured) / 60, 1)


def _merit(found: Mapping[str, Any]) -> tuple[float, float]:
    """Most answers that are both right and as asked; among equals the most plain ones right."""
    numbers = found["numbers"]
    return numbers["both"]["value"], numbers["plain_right"]["value"]


def further(swept: Mapping[float, Found], most: float) -> float | None:
    """The next strength to try where the best one is at an edge of the grid."""
    if len(swept) < 2:
        return None

    def step(strength: float, way: int) -> float | None:
        found = strength * STEPS**way
        return round(found, 3) if found <= most else None

    return beyond_edge(swept, max(swept, key=lambda s: _merit(swept[s])), step)


def _brief(found: Mapping[str, Any]) -> dict[str, float]:
    names = ("plain_right", "whole_constrained", "followed", "both")
    return {name: round(found["numbers"][name]["value"], 3) for name in names}


def load_rows(results: Path) -> Sequence[Found]:
    """All rows kept in a folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
