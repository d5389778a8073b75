"""Does RCP-Merging's vote know which elements to take? Its rows beside random masks on one trio."""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from testbed.judging.intervals import Numbers, Ratio, difference, resamples, unpacked
from testbed.language import vote
from testbed.language.board import ROLES, Board
from testbed.language.judging import model_digest, write_json
from testbed.language.making import digest, digest_of_sets
from testbed.language.recipes import Config, Row, masked, slug, task_arithmetic
from testbed.models.loading import load_model, load_tokenizer
from testbed.puzzles.records import Record, read_lines

LOG = logging.getLogger(__name__)
STRENGTHS = (0.3, 0.5, 0.8, 1.3)  # of every row, to compare like with like
PUBLISHED = 1000.0  # penalty
SEEDS = (0, 1)  # of random masks
VOTE, EVEN, REST, ALL = "vote", "vote, even penalty", "complement of the vote", "task_arithmetic"
RANDOM = "random mask"
FACTS = Path("masks") / "facts.json"  # beside the rows, where none is looked for
PAIRS = (
    (VOTE, f"{RANDOM} {SEEDS[0]}"),
    (VOTE, f"{RANDOM} {SEEDS[1]}"),
    (VOTE, REST),
    (VOTE, ALL),
    (EVEN, f"{RANDOM}, even penalty"),
    (EVEN, VOTE),
)
COMPARED = ("both", "all_three", "plain_right")
Found = dict[str, Any]


@dataclass(frozen=True)
class Texts:
    """How many of a trio's texts are looked at.

    plain, constrained: by the prior, of the reasoning model's own outputs.
    instruction: by the vote.
    """

    plain: int = 25
    constrained: int = 25
    instruction: int = 100

    def read(self, trio: Path) -> dict[str, list[Record]]:
        return {
            name: read_lines(trio / f"{name}.jsonl")[:count] for name, count in asdict(self).items()
        }


@dataclass(frozen=True)
class Voting:
    """The masks of one trio, as models in its folder, and the rows of them on a board."""

    trio: Path
    texts: Texts = Texts()

    @property
    def name(self) -> str:
        """Of the folder within the trio."""
        models = [model_digest(self.trio / role) for role in ROLES]
        said = [models, digest_of_sets(self.trio), asdict(self.texts), PUBLISHED, SEEDS]
        return f"masked-{digest(said)}"

    def facts(self) -> Found:
        """Densities and how well the vote repeats; the masked models are made where missing."""
        path = self.trio / self.name / FACTS.name
        if not path.exists():
            start = time.monotonic()
            found = {**self._make(path.parent), "texts": asdict(self.texts)}
            LOG.info("masks in %.0f s: %s", time.monotonic() - start, found)
            write_json(path, found)
        made: Found = json.loads(path.read_text(encoding="utf-8"))
        return made

    def rows(self) -> list[Row]:
        """The vote's row, its controls, and the same change without a mask."""
        named = [VOTE, f"{RANDOM} {SEEDS[0]}", REST, EVEN, f"{RANDOM}, even penalty"]
        named.append(f"{RANDOM} {SEEDS[1]}")
        rows = [Row(name, STRENGTHS, masked(f"{self.name}/{slug(name)}")) for name in named]
        rows.insert(3, Row(ALL, STRENGTHS, task_arithmetic))
        return [replace(row, most=STRENGTHS[-1]) for row in rows]

    def _make(self, out: Path) -> Found:
        tallies, penalty = self._tallies()
        densities: dict[str, float] = {}
        for name, mask in _masks(*(tally.mask for tally in tallies)):
            vote.write_masked(self.trio, mask, out / slug(name))
            densities[name] = vote.density(mask)
        return {
            "penalties": {VOTE: PUBLISHED, EVEN: penalty},
            "agreement": {n: t.agreement for n, t in zip((VOTE, EVEN), tallies, strict=True)},
            "density": densities,
        }

    def _tallies(self) -> tuple[list[vote.Tally], float]:
        """With the published penalty and with the even one, and what that is."""
        read, tokenizer = self.texts.read(self.trio), load_tokenizer(self.trio / "reasoning")
        own = [vote.whole(tokenizer, r) for r in (*read["plain"], *read["constrained"])]
        reasoning, instruct = (load_model(self.trio / role) for role in ROLES[1:])
        unit = vote.distances(vote.prior(reasoning, own), reasoning, instruct)
        del reasoning
        tokenizer = load_tokenizer(self.trio / "instruct")
        asked = [vote.answer(tokenizer, record) for record in read["instruction"]]
        penalty = vote.even_penalty(instruct, asked, unit)
        return vote.tallied(instruct, asked, unit, (PUBLISHED, penalty)), penalty


def _masks(published: vote.Weights, even: vote.Weights) -> Iterator[tuple[str, vote.Weights]]:
    yield VOTE, published
    yield REST, vote.complement(published)
    yield EVEN, even
    for seed in SEEDS:
        yield f"{RANDOM} {seed}", vote.at_random(published, seed)
    yield f"{RANDOM}, even penalty", vote.at_random(even, SEEDS[0])


def fill(board: Board, first: int | None = None) -> Found:
    """Judge all rows, or the `first` of them; returns what is written beside them."""
    voting = Voting(board.trio)
    facts = voting.facts()
    judged = {row.name: board.row(row) for row in islice(voting.rows(), first)}
    found = {**facts, "comparisons": comparisons(board.test.records, judged)}
    write_json(board.results / FACTS, found)
    return found


def comparisons(records: Sequence[Record], rows: Mapping[str, Mapping[str, Any]]) -> list[Config]:
    """First less second on the same test prompts, with the paired 95 % interval.

    records: in the order in which they were judged. Pairs of which a row is missing are left out.
    """
    asked = np.array([float(bool(record["constraints"])) for record in records])
    strata = [f"{bool(r['constraints'])}/{r['held_out_wording']}" for r in records]
    counts = resamples(strata)
    found = []
    for first, second in PAIRS:
        if first in rows and second in rows:
            apart = {
                name: difference(*(_ratio(rows[n], name, asked) for n in (first, second)), counts)
                for name in COMPARED
            }
            found.append({"first": first, "second": second, "difference": apart})
    return found


def _ratio(row: Mapping[str, Any], name: str, asked: Numbers) -> Ratio:
    bits = {kind: unpacked(row["bits"][kind]) for kind in ("right", "both", "whole")}
    if name == "plain_right":
        return Ratio(bits["right"] * (1 - asked), 1 - asked)
    values = bits["both"] * (bits["whole"] if name == "all_three" else 1)
    return Ratio(values * asked, asked)
