"""docs/language-questions.md: what decides a merge, from rows that differ in one thing each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rain_mergekit.report.svg import FAINT, STYLE
from testbed.board.frontier import COLOURS, write_picture
from testbed.board.tables import MODELS, between, markdown, percent
from testbed.language.board import load_rows

PAGE = Path(__file__).resolve().parents[2] / "docs" / "language-questions.md"
# By the name of a table: its rows, and the trio on which they were judged.
TABLES = {
    "language questions": ("questions.yml", "trio-s1-third"),
    "language questions of teachers": ("questions-teachers.yml", "trio-s2-fourth"),
    "language questions of starts": ("questions-starts.yml", "trio-gemma-s0-third"),
    "language questions of prompts": ("questions-prompts.yml", "trio-gemma-s0-fourth"),
    "language questions of prompts, first family": (
        "questions-prompts-smollm2.yml",
        "trio-s2-fifth",
    ),
    "language questions of instructions": ("questions-instructions.yml", "trio-gemma-s0-fifth"),
    "language questions of instructions, first family": (
        "questions-instructions.yml",
        "trio-s1-fifth",
    ),
    "language questions of the projection": ("questions-projection.yml", "trio-s1-sixth"),
}
LATER = ("trio-s1-sixth", "trio-s0-sixth")  # the trios that were asked in later turns too
TURNS = {"choosing": "first turn", "later": "second turn"}
PICTURE = "language-depth"
SHOWN = {
    "plain_right": "plain right",
    "constrained_right": "right",
    "whole_constrained": "whole",
    "followed": "followed",
    "both": "both",
    "both_held_out": "both, held-out wording",
}
FIT = ("mean rank", "file, MB", "distance at answers")
GROUPS = {"answers": "answers", "thinking": "thinking", "markers": "markers", "prompts": "prompts"}
Found = Mapping[str, Any]


def asked(name: str) -> list[str]:
    """The rows of a table in the order of the page; the first is what the others differ from."""
    return _names(TABLES[name][0])


def _names(file: str) -> list[str]:
    """The rows that a file beside this one asks for, in its order."""
    rows = Path(__file__).with_name(file).read_text(encoding="utf-8")
    return [str(entry["name"]) for entry in yaml.safe_load(rows)]


def write_page(results: Path) -> Path:
    """Put the tables into the page and draw its picture. results: the folder of all trios' rows."""
    PAGE.write_text(written(results), encoding="utf-8")
    draw(answered(results, next(iter(TABLES)))[0]["fit"])
    return PAGE


def written(results: Path) -> str:
    """The page's text with its tables."""
    text = PAGE.read_text(encoding="utf-8")
    for name in TABLES:
        text = between(text, name, "\n" + table(answered(results, name)) + "\n")
    for trio in LATER:
        found = "\n" + turns(results / "later" / trio) + "\n"
        text = between(text, f"language questions of turns, {trio}", found)
    return text


def turns(results: Path) -> str:
    """Each model in a chat's first turn and in its second, where the same is asked.

    results: the folder of one trio.
    """
    rows = {split: {row["name"]: row for row in load_rows(results / split)} for split in TURNS}
    known = [*MODELS[1:], *_names("questions-later.yml")]
    names = [name for name in known if all(name in rows[split] for split in TURNS)]
    lines = [
        [f"{name}, {turn}", *(percent(rows[split][name]["numbers"][n]["value"]) for n in SHOWN)]
        for name in names
        for split, turn in TURNS.items()
    ]
    return markdown(["", *SHOWN.values()], lines)


def table(rows: Sequence[Found]) -> str:
    """A line a row: percent of prompts, and what its calibration file takes."""
    lines = []
    for row in rows:
        shares = (percent(float(row["numbers"][name]["value"])) for name in SHOWN)
        lines.append([row["name"], *shares, *_of_fit(row)])
    fitted = any("fit" in row for row in rows)
    return markdown(["", *SHOWN.values(), *(FIT if fitted else ())], lines)


def _of_fit(row: Found) -> list[str]:
    """What FIT names; a projection has no fit."""
    if "fit" not in row:
        return []
    fit = row["fit"]
    held_out = fit["held_out"]["answers"][-1]
    return [f"{fit['mean_rank']:.0f}", f"{fit['bytes'] / 1e6:.1f}", f"{held_out:.2f}"]


def answered(results: Path, name: str) -> list[Found]:
    """The rows of a table that have been judged, in the order of the page."""
    rows = load_rows(results / "questions" / TABLES[name][1] / "choosing")
    named = {row["name"]: row for row in rows}
    return [named[one] for one in asked(name) if one in named]


def draw(fit: Found) -> Path:
    """Distance from the teacher after each layer, a line a group; returns the file."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.5, 4.0), layout="constrained")
        _fill(figure.subplots(), fit)
        label = "Distance of the merged hidden states from their teacher"
        return write_picture(figure, PICTURE, label)


def _fill(axes: Axes, fit: Found) -> None:
    for colour, (group, name) in zip(COLOURS, GROUPS.items(), strict=False):
        layers = range(1, len(fit["held_out"][group]) + 1)
        axes.plot(layers, fit["held_out"][group], color=colour, label=f"{name}, held out")
        axes.plot(
            layers, fit["fitted"][group], color=colour, linestyle=":", label=f"{name}, fitted"
        )
    axes.set(xlabel="layer", ylabel="distance from the teacher, relative", ylim=(0, None))
    axes.grid(color=FAINT, alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
