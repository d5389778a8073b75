"""What docs/results-language.md and the page of earlier boards say of the rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from testbed.board.frontier import draw
from testbed.board.tables import MODELS, between, markdown, percent, small, with_interval
from testbed.language.board import load_rows
from testbed.language.repeats import repeats
from testbed.language.table import DEFAULTS, table

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "results-language.md"
EARLIER = DOCS / "results-language-earlier.md"
OURS = "rain"
TIMED = "trio-s1-sixth"  # every row says what it took
# What the parts of a page are named after, by the folder of the rows they are written from.
TRIOS = {
    PAGE: {
        "trio-s0-fifth": "",
        "trio-s1-sixth": " of seed 1",
        "trio-s2-sixth": " of seed 2",
        "trio-gemma-s0-sixth": " of a second family",
    },
    EARLIER: {
        "trio-s0": " of seed 0",
        "trio-s1-quick": " of seed 1",
        "trio-s2": " of seed 2",
        "trio-s2-again": " of seed 2 again",
        "trio-gemma-s0": " of a second family",
        "trio-s0-third": " of seed 0, weighed",
        "trio-gemma-s0-second": " of a second family, before",
        "trio-s1-third": " of seed 1, third",
        "trio-s2-third": " of seed 2, third",
        "trio-s2-fifth": " of seed 2, fifth",
        "trio-gemma-s0-third": " of a second family, third",
    },
}
TRIED = {
    "plain_right": "plain right",
    "constrained_right": "right",
    "whole_constrained": "whole",
    "followed": "followed",
    "both": "both",
    "both_held_out": "both, held-out wording",
    "both_uncalibrated": "both, uncalibrated",
}
SWEPT = {
    "plain_right": "plain right",
    "whole_constrained": "whole, constrained",
    "followed": "followed",
    "both": "both",
}


def write_pages(results: Path) -> list[Path]:
    """Put what is written from rows into both pages. results: the folder of all trios' rows."""
    for page, trios in TRIOS.items():
        text = written(page, results)
        for trio, named in trios.items():
            draw(load_rows(results / trio), f"language-{trio}", f"the trio{named}")
        page.write_text(text, encoding="utf-8")
    return list(TRIOS)


def written(page: Path, results: Path) -> str:
    """The page's text with the parts that are written from rows."""
    text = page.read_text(encoding="utf-8")
    for trio, named in TRIOS[page].items():
        rows = load_rows(results / trio)
        text = between(text, f"language verdict{named}", verdict(rows) + "\n")
        text = between(text, f"language table{named}", "\n" + table(rows) + "\n")
        text = between(text, f"language strengths{named}", "\n" + strengths(rows) + "\n")
    if page == PAGE:
        text = between(text, "language overview", "\n" + overview(results) + "\n")
        text = between(text, "language hours", "\n" + hours(results) + "\n")
        text = between(text, "language repeats", "\n" + repeats(results) + "\n")
        text = between(text, "language attempts", "\n" + attempts(results) + "\n")
    return text


def overview(results: Path) -> str:
    """A line a trio: what the defaults reach, beside the ceiling and the best merge of others."""
    lines = []
    for trio in TRIOS[PAGE]:
        rows = {row["name"]: row for row in load_rows(results / trio)}
        ours, ceiling = rows[DEFAULTS], _value(rows["ceiling"], "both")
        rival = max(
            (row for name, row in rows.items() if name not in MODELS and not name.startswith(OURS)),
            key=_merit,
        )
        plain, kept = (_value(row, "plain_right") for row in (ours, rows["reasoning"]))
        lines.append(
            [
                trio.removeprefix("trio-"),
                with_interval(ours["numbers"]["both"]),
                percent(ceiling),
                percent(_value(ours, "both") / ceiling),
                f"{percent(_value(rival, 'both'))} ({rival['name']})",
                f"{percent(plain)} ({percent(kept)})",
                percent(_value(ours, "whole_constrained")),
                small(_value(ours, "L_think")),
            ]
        )
    header = ["both", "ceiling", "% of it", "best of others", "plain right (reasoning model)"]
    return markdown(["trio", *header, "whole", "L_think"], lines)


def hours(results: Path) -> str:
    """What each row took, all strengths together, on the trio whose rows were timed."""
    rows = sorted(load_rows(results / TIMED), key=lambda row: row["minutes"])
    models = [row for row in rows if row["name"] in MODELS]
    merges = [row for row in rows if row["name"] not in MODELS]
    quick, slow = merges[0], merges[-1]
    total = sum(row["minutes"] for row in rows) / 60
    return (
        f"The {len(rows)} rows of `{TIMED.removeprefix('trio-')}` took {total:.1f} hours of one "
        f"core, from {quick['minutes']:.0f} minutes (`{quick['name']}`) to {slow['minutes']:.0f} "
        f"(`{slow['name']}`, with its calibration); the {len(models)} rows of the models alone "
        f"{sum(row['minutes'] for row in models):.0f} minutes."
    )


def strengths(rows: Sequence[Mapping[str, Any]]) -> str:
    """What each strength of a rival does on the validation prompts."""
    lines = [
        [row["name"], strength, *(percent(found[name]) for name in SWEPT)]
        for row in rows
        for strength, found in row.get("swept", {}).items()
    ]
    return markdown(["", "strength", *SWEPT.values()], lines)


def attempts(results: Path) -> str:
    """Settings that were tried on prompts for choosing, of all trios."""
    lines = [
        [
            row["name"],
            folder.parent.name.removeprefix("trio-"),
            str(row["samples"]["instruction"]),
            *(percent(_value(row, name)) for name in TRIED),
        ]
        for folder in sorted(results.glob("*/choosing"))
        for row in load_rows(folder)
    ]
    return markdown(["", "trio", "instruction samples", *TRIED.values()], lines)


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """One paragraph: the best merge of ours beside the best rival and the ceiling."""
    named = {row["name"]: row for row in rows}
    merges = [row for row in rows if row["name"] not in MODELS]
    ours = [row for row in merges if row["name"].startswith(OURS)]
    rivals = [row for row in merges if not row["name"].startswith(OURS)]
    if not ours or not rivals or "ceiling" not in named:
        return "Not all rows are there yet."
    best, rival = max(ours, key=_merit), max(rivals, key=_merit)
    ceiling = _value(named["ceiling"], "both")
    share = f"{percent(_value(best, 'both') / ceiling)} % of it" if ceiling else "none of it"
    return (
        f"**{_told(best)}** {_told(rival, lead='The best rival, ')} "
        f"The reasoning model itself has {percent(_value(named['reasoning'], 'plain_right'))} % "
        f"plain right; the ceiling of *both* is {percent(ceiling)} %, and the best merge reaches "
        f"{share}. {_weighed(best, rival)}"
    )


def _told(row: Mapping[str, Any], lead: str = "") -> str:
    strength = f" at {row['strength']:g}" if row.get("strength", 1) != 1 else ""
    name = f"{lead}`{row['name']}`{strength}" if lead else f"`{row['name']}`{strength}"
    return (
        f"{name}, is right and follows the constraint on {percent(_value(row, 'both'))} % of the "
        f"constrained prompts, keeps the thinking block whole on "
        f"{percent(_value(row, 'whole_constrained'))} % of them, has "
        f"{percent(_value(row, 'plain_right'))} % plain right, and an L_think of "
        f"{small(_value(row, 'L_think'))}."
    )


def _weighed(best: Mapping[str, Any], rival: Mapping[str, Any]) -> str:
    low, high = (row["numbers"]["both"]["interval"] for row in (best, rival))
    if low[0] > high[1]:
        return "The intervals of the two do not overlap."
    if _value(best, "both") > _value(rival, "both"):
        return "Their intervals overlap: more prompts are needed to tell them apart."
    return "No setting of ours beats that rival in *both* here."


def _merit(row: Mapping[str, Any]) -> tuple[float, float]:
    return _value(row, "both"), _value(row, "whole_constrained")


def _value(row: Mapping[str, Any], name: str) -> float:
    return float(row["numbers"][name]["value"])
