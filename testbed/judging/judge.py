"""Judge one model on one list of prompts, prompt by prompt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from rain_mergekit.system.evenly_spaced import first_of_parts
from testbed.judging.divergence import PLACES, checkpoint, marked, meter
from testbed.judging.intervals import Numbers, Ratio, described, packed
from testbed.judging.scoring import CLOSE, OPEN, Score, score
from testbed.models.generation import generate
from testbed.models.loading import LONGEST_OUTPUT, load_model, load_tokenizer, opens_block
from testbed.puzzles.records import Record

KEPT = ("accurate", "followed", "both")
EVERYWHERE = ("no_close", "no_thinking", "thinking_right", "content_lost", "thinking_words")


class Judge:
    """The prompts of one split and what the reasoning model thinks of their ideal texts.

    uncalibrated: constraints that no calibration text shows.
    """

    def __init__(
        self,
        reference: Path,
        tokenizer: PreTrainedTokenizerFast,
        prompts: Sequence[Record],
        uncalibrated: Sequence[str] = (),
    ) -> None:
        self.prompts, self._uncalibrated = prompts, uncalibrated
        self._texts = [marked(tokenizer, record) for record in prompts]
        self._meter = meter(reference, self._texts)

    def measure(
        self, model: Path, tokenizer: PreTrainedTokenizerFast, *, divergent: bool = True
    ) -> dict[str, Any]:
        """Numbers with intervals, and yes or no per prompt for paired comparisons."""
        outputs = self._outputs(model, tokenizer)
        more = self._divergences(model) if divergent else {}
        return self._judged(outputs, more, opened=opens_block(tokenizer))

    def ceiling(self, reasoning: Path, instruct: Path) -> dict[str, Any]:
        """The instruct model goes on where the reasoning model's thinking ends."""
        voice, other = load_tokenizer(reasoning), load_tokenizer(instruct)
        opened = opens_block(voice)
        heads = [_head(output, opened=opened) for output in self._outputs(reasoning, voice)]
        after = self._outputs(instruct, other, heads)
        joined = [head + output for head, output in zip(heads, after, strict=True)]
        return self._judged(joined, {}, opened=opens_block(other))

    def _outputs(
        self,
        model: Path,
        tokenizer: PreTrainedTokenizerFast,
        given: Sequence[str] | None = None,
    ) -> list[str]:
        prompts = [record["prompt"] for record in self.prompts]
        found = generate(load_model(model), tokenizer, prompts, given, LONGEST_OUTPUT)
        return [output.text for output in found]

    def _judged(
        self, outputs: Sequence[str], more: dict[str, Ratio], *, opened: bool
    ) -> dict[str, Any]:
        pairs = zip(self.prompts, outputs, strict=True)
        scores = [score(record, output, opened) for record, output in pairs]
        ratios = {**shares(self.prompts, scores, self._uncalibrated), **more}
        bits = {name: packed([bool(getattr(one, name)) for one in scores]) for name in KEPT}
        return {"numbers": described(ratios, strata(self.prompts)), "bits": bits}

    def _divergences(self, model: Path) -> dict[str, Ratio]:
        found: dict[str, tuple[list[float], list[int]]] = {place: ([], []) for place in PLACES}
        measured = self._meter.divergences(checkpoint(model))
        for text, apart in zip(self._texts, measured, strict=True):
            for place, positions in text.positions.items():
                found[place][0].append(float(apart[positions].sum()))
                found[place][1].append(len(positions))
        return {place: Ratio(np.array(s), np.array(n, float)) for place, (s, n) in found.items()}


def _head(output: str, *, opened: bool) -> str:
    """What the reasoning model says up to its answer, with the block opened where it is not."""
    block, close, rest = output.partition(CLOSE)
    space = rest[: len(rest) - len(rest.lstrip())]
    return f"{OPEN}\n" * opened + block + close + space


def strata(prompts: Sequence[Record]) -> list[str]:
    """Prompts without a constraint, with one in known and in held-out wording."""
    return [f"{bool(r['constraint'])}/{bool(r['held_out_wording'])}" for r in prompts]


def domains(prompts: Sequence[Record], uncalibrated: Sequence[str] = ()) -> dict[str, Numbers]:
    """1 where a prompt counts."""
    return {
        "plain": np.array([not r["constraint"] for r in prompts], float),
        "asked": np.array([bool(r["constraint"]) for r in prompts], float),
        "unseen": np.array([bool(r["held_out_wording"]) for r in prompts], float),
        "uncalibrated": np.array([r["constraint"] in uncalibrated for r in prompts], float),
        "all": np.ones(len(prompts)),
    }


def shares(
    prompts: Sequence[Record], scores: Sequence[Score], uncalibrated: Sequence[str] = ()
) -> dict[str, Ratio]:
    """The shares of testbed.judging.scoring.summary, as ratios over prompts."""
    where = domains(prompts, uncalibrated)

    def over(field: str, domain: str) -> Ratio:
        values = np.array([float(getattr(one, field)) for one in scores])
        return Ratio(values * where[domain], where[domain])

    return {
        "plain_accuracy": over("accurate", "plain"),
        "constrained_accuracy": over("accurate", "asked"),
        "followed": over("followed", "asked"),
        "both": over("both", "asked"),
        "both_held_out": over("both", "unseen"),
        "both_uncalibrated": over("both", "uncalibrated"),
        **{name: over(name, "all") for name in EVERYWHERE},
    }


def chosen(records: Sequence[Record], limit: int | None) -> list[Record]:
    """Evenly first_of_parts `limit` prompts with a constraint and half as many without."""
    asked = [record for record in records if record["constraint"]]
    plain = [record for record in records if not record["constraint"]]
    if limit is None:
        return [*asked, *plain]
    return [*first_of_parts(asked, limit), *first_of_parts(plain, limit // 2)]
