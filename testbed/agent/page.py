"""The measured part of docs/other-direction.md, written from the results."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from testbed.agent.board import RESULTS
from testbed.board.tables import NONE, between, markdown, percent, with_interval

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "other-direction.md"
COLUMNS = {
    "thinks": "chains/thought",
    "thinks rightly": "chains/thought_right",
    "call's format": "chains/form",
    "number": "chains/number",
    "call right": "chains/both",
    "call right, tools in no calibration text": "held/both",
    "look-ups: call right": "look-ups/both",
    "look-ups: thinks": "look-ups/thought",
}
WITH_INTERVAL = ("chains/form", "chains/number", "chains/both", "held/both")
SWEPT = {name: COLUMNS[name] for name in ("thinks", "call's format", "number", "call right")}
PARTS = ("table", "verdict", "head", "outputs", "strengths")
OURS, RIVALS = "rain, streams", ("linear, half of each", "linear", "task_arithmetic")


def write_page(results: Path = ROOT / RESULTS, page: Path = PAGE) -> Path:
    """Put what is written from the results into the page."""
    found = json.loads(results.read_text(encoding="utf-8"))
    page.write_text(written(page.read_text(encoding="utf-8"), found), encoding="utf-8")
    return page


def written(text: str, found: Mapping[str, Any]) -> str:
    """The page's text with the parts that are written from the results."""
    rows = found["rows"]
    parts = (table(rows), verdict(rows), head(found["reading"]), outputs(rows), strengths(rows))
    for name, made in zip(PARTS, parts, strict=True):
        text = between(text, f"agent {name}", f"\n{made}\n\n")
    return text


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a row, in the order of the results."""
    lines = [[_named(row), *(_cell(row, name) for name in COLUMNS.values())] for row in rows]
    return markdown(["", *COLUMNS], lines)


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """The merge of stream matching beside the agent, the ceiling and the best rival."""
    by = {(row["name"], row["begins"]): row for row in rows}

    def share(name: str, begins: str, part: str) -> str:
        return percent(by[name, begins]["numbers"][part]["value"])

    def best(begins: str) -> str:
        there = [name for name in RIVALS if (name, begins) in by]
        name = max(there, key=lambda n: by[n, begins]["numbers"]["chains/both"]["value"])
        return f"`{name}` {share(name, begins, 'chains/both')} %"

    return (
        f"Left to itself the merge of stream matching thinks on "
        f"{share(OURS, '', 'chains/thought')} % of the chains "
        f"and has {share(OURS, '', 'chains/both')} % of the calls right (the agent "
        f"{share('agent', '', 'chains/both')} %, the best rival, {best('')}, the ceiling "
        f"{share('ceiling', '', 'chains/both')} %); without a chain "
        f"{share(OURS, '', 'look-ups/both')} % of its calls are right (the agent "
        f"{share('agent', '', 'look-ups/both')} %). Where the block is opened for it, it thinks on "
        f"{share(OURS, 'opened', 'chains/thought')} %, rightly on "
        f"{share(OURS, 'opened', 'chains/thought_right')} %, and has "
        f"{share(OURS, 'opened', 'chains/both')} % of the calls right, of tools that no "
        f"calibration text has {share(OURS, 'opened', 'held/both')} % (the agent itself, opened, "
        f"{share('agent', 'opened', 'chains/both')} %; the best rival, {best('opened')})."
    )


def head(found: Mapping[str, float]) -> str:
    """What the agent's head makes of the donor's states."""
    return (
        f"The agent's norm and head read {percent(found['tokens'])} % of the tokens of the donor's "
        f"thinking rightly from the donor's own last states, and {percent(found['first'])} % of "
        f"those that open it ({found['texts']:.0f} texts, `python -m testbed.agent head`)."
    )


def _named(row: Mapping[str, Any]) -> str:
    chosen = f" at {row['strength']:g}" if row.get("swept") else ""
    opened = ", opened" if row["begins"] else ""
    return f"{row['name']}{opened}{chosen}"


def _cell(row: Mapping[str, Any], name: str) -> str:
    if name not in row["numbers"]:
        return NONE
    found = row["numbers"][name]
    return with_interval(found) if name in WITH_INTERVAL else percent(found["value"])


def strengths(rows: Sequence[Mapping[str, Any]]) -> str:
    """What each strength does on the validation prompts."""
    lines = [
        [
            f"{row['name']}{', opened' if row['begins'] else ''}",
            strength,
            *(percent(found[name]) for name in SWEPT.values()),
        ]
        for row in rows
        for strength, found in row.get("swept", {}).items()
    ]
    return markdown(["", "strength", *SWEPT], lines)


def outputs(rows: Sequence[Mapping[str, Any]]) -> str:
    """What each row says to the first test prompt."""
    prompt = rows[0]["examples"][0]["prompt"]
    said = [f"{_named(row)}:\n{row['examples'][0]['output'].strip()}" for row in rows]
    return "```text\n" + "\n\n".join([f"prompt:\n{prompt}", *said]) + "\n```"
