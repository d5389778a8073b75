"""The rows: models, merges at strengths chosen on validation prompts, and what each says."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from testbed.agent.making import continued, prompts_of, said
from testbed.agent.scoring import score
from testbed.agent.tools import HELD, MARKERS
from testbed.judging.intervals import Ratio, described
from testbed.language.judging import model_digest, write_json
from testbed.language.making import merged, write_calibration
from testbed.language.recipes import FLOAT, Config
from testbed.puzzles.counting import THINGS
from testbed.puzzles.records import Record

LOG = logging.getLogger(__name__)
RESULTS = Path("testbed/results/agent/board.json")
UNCALIBRATED = frozenset(tool.name for tool in HELD)
FIELDS = ("thought", "thought_right", "form", "number", "both", "at_once")
EXAMPLES = 1  # outputs that are kept, of the first test prompts
Found = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A merge; of several strengths the best on validation prompts is judged.

    sets: the files of what stays and of what comes, where the merge is calibrated.
    """

    name: str
    recipe: Callable[[Path, float], Config]
    strengths: tuple[float, ...] = (1.0,)
    sets: tuple[str, str] | None = None
    rain: Mapping[str, Any] = field(default_factory=dict)


def linear(folder: Path, share: float) -> Config:
    """The donor's share of every weight."""
    models = [(folder / "agent", 1 - share), (folder / "donor", share)]
    weights = [{"model": str(path), "parameters": {"weight": w}} for path, w in models]
    return {"merge_method": "linear", "models": weights, **FLOAT}


def task_arithmetic(folder: Path, strength: float) -> Config:
    """The agent and the donor's task vector."""
    models = [(folder / "donor", strength), (folder / "parent", -strength)]
    weights = [{"model": str(path), "parameters": {"weight": w}} for path, w in models]
    base = {"merge_method": "task_arithmetic", "base_model": str(folder / "agent")}
    return {**base, "models": weights, **FLOAT}


def rain(folder: Path, strength: float) -> Config:
    """The agent stays; the donor's thinking comes."""
    donor = {"model": str(folder / "donor"), "parameters": {"role": "instruct"}}
    base = {"merge_method": "rain", "base_model": str(folder / "agent"), **FLOAT}
    return {**base, "models": [donor], "parameters": {"lambda": strength}}


TAGS = {"markers": MARKERS, "blocks": "optional"}
ROWS = (
    Row("linear, half of each", linear, (0.5,)),
    Row("linear", linear, (0.3, 0.5, 0.7)),
    Row("task_arithmetic", task_arithmetic, (0.3, 0.5, 0.7, 1.0)),
    Row("rain, streams", rain, sets=("stays", "comes"), rain=TAGS),
    Row("rain, streams, `markers: none`", rain, sets=("stays", "comes"), rain={"markers": "none"}),
    Row("rain, streams, chains in both sets", rain, sets=("stays-chains", "comes"), rain=TAGS),
)
# A reply begins freely, or after an opened block, as where the chat template writes that.
BEGINNINGS = {"": "", "opened": "<think>\n"}


def kind(record: Record) -> str:
    """Of a prompt: with a chain, with one and a tool of no calibration text, or a look-up."""
    if " " not in record["key"]:
        return "look-ups"
    return "held" if record["tool"] in UNCALIBRATED else "chains"


def judged(records: Sequence[Record], outputs: Sequence[str]) -> Found:
    """Shares by kind of prompt and field, with intervals."""
    things = frozenset(THINGS)
    scores = [asdict(score(r, o, things)) for r, o in zip(records, outputs, strict=True)]
    of = [kind(record) for record in records]
    ratios = {}
    for name in dict.fromkeys(of):
        where = np.array([float(one == name) for one in of])
        for part in FIELDS:
            values = np.array([float(one[part]) for one in scores])
            ratios[f"{name}/{part}"] = Ratio(values * where, where)
    return described(ratios, of)


class Board:
    """One agent with its prompts and sets. work: for merges and calibrations on the way."""

    def __init__(self, folder: Path, work: Path) -> None:
        self._folder, self._work = folder, work
        self._agent, self._donor = folder / "agent", folder / "donor"
        self._prompts = {split: prompts_of(folder, split) for split in ("validation", "test")}

    def makers(self) -> dict[tuple[str, str], Callable[[], Found]]:
        """What makes each row, by its name and how replies begin; models first."""
        test, agent = self._prompts["test"], self._agent

        def model(name: str, path: Path, begins: str) -> Found:
            return self._row(name, begins, self._said(path, self._asked(begins), begins))

        def ceiling(name: str, path: Path) -> Found:
            heads, calls = continued(self._donor, path, test)
            return self._row(name, "", [h + c for h, c in zip(heads, calls, strict=True)])

        found: dict[tuple[str, str], Callable[[], Found]] = {
            ("agent", ""): partial(model, "agent", agent, ""),
            ("donor", ""): partial(model, "donor", self._donor, ""),
            ("ceiling", ""): partial(ceiling, "ceiling", agent),
            ("agent", "opened"): partial(model, "agent", agent, "opened"),
        }
        for begins in BEGINNINGS:
            for row in ROWS:
                found[row.name, begins] = partial(self._best, row, begins)
        return found

    def _asked(self, begins: str) -> list[Record]:
        """Test prompts; an opened block is for those that have a chain to think about."""
        return [r for r in self._prompts["test"] if not begins or kind(r) != "look-ups"]

    def _said(self, model: Path, records: Sequence[Record], begins: str) -> list[str]:
        start = BEGINNINGS[begins]
        prompts = [record["prompt"] for record in records]
        return [start + rest for rest in said(model, prompts, [start] * len(prompts))]

    def _row(self, name: str, begins: str, outputs: Sequence[str], **more: Any) -> Found:
        records = self._asked(begins)
        numbers = judged(records, outputs)
        shown = {key: round(one["value"], 3) for key, one in numbers.items()}
        LOG.info("%s %s %s: %s", name, begins, more.get("strength", ""), shown)
        examples = [
            {"prompt": record["prompt"], "output": output}
            for record, output in zip(records[:EXAMPLES], outputs, strict=False)
        ]
        named = {"name": name, "begins": begins}
        return {**named, **more, "numbers": numbers, "examples": examples}

    def _best(self, row: Row, begins: str) -> Found:
        """Choose the strength where there is a choice, then judge."""
        choosing = [r for r in self._prompts["validation"] if kind(r) == "chains"]
        swept: dict[float, dict[str, float]] = {}
        for strength in row.strengths if len(row.strengths) > 1 else ():
            outputs = self._said(self._merged(row, strength), choosing, begins)
            found = judged(choosing, outputs)
            swept[strength] = {key: one["value"] for key, one in found.items()}
            LOG.info("%s %s at %g: %s", row.name, begins, strength, swept[strength])
        best = max(swept, key=lambda s: swept[s]["chains/both"]) if swept else row.strengths[0]
        path = self._merged(row, best)
        named = {"strength": best, "model": model_digest(path)}
        brief = {f"{s:g}": found for s, found in swept.items()}
        outputs = self._said(path, self._asked(begins), begins)
        return self._row(row.name, begins, outputs, **named, swept=brief)

    def _merged(self, row: Row, strength: float) -> Path:
        """The folder of a merge; made once for each agent and pair of sets."""
        slug = "".join(c if c.isalnum() else "-" for c in row.name)
        config = row.recipe(self._folder, strength)
        if row.sets is not None:
            stays, comes = (str(self._folder / f"{name}.jsonl") for name in row.sets)
            config["rain"] = {"reasoning_data": stays, "instruction_data": comes, **row.rain}
        out = self._work / f"{model_digest(self._agent)}-{slug}-{strength:g}"
        if (out / "config.json").exists():
            return out
        if row.sets is not None:
            calibration = Path(f"{out}.rain.safetensors")
            config["parameters"]["calibration"] = str(calibration)
            write_calibration(config, calibration)
        return merged(config, out)


def fill(folder: Path, work: Path, results: Path = RESULTS, names: Sequence[str] = ()) -> Path:
    """All rows, or those named, in this order, beside those kept of the same models and files."""
    work.mkdir(parents=True, exist_ok=True)
    key = {
        "agent": model_digest(folder / "agent"),
        "donor": model_digest(folder / "donor"),
        "files": {
            path.stem: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            for path in sorted(folder.glob("*.jsonl"))
        },
    }
    kept = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    kept = kept if kept.get("key") == key else {}
    rows = kept.get("rows", [])
    done = {(row["name"], row["begins"]): row for row in rows}
    makers = Board(folder, work).makers()
    wanted = [place for name in names for place in makers if place[0] == name] or list(makers)
    for place in wanted:
        if place not in done:
            done[place] = makers[place]()
            ordered = [done[one] for one in makers if one in done]
            write_json(results, {**kept, "key": key, "rows": ordered})
    return results
