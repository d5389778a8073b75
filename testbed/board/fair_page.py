"""docs/results.md and a page for each trio, made from the fair scoreboard's JSON alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from testbed.board import frontier, tables
from testbed.board.fair_rows import CEILING, RAIN, STREAMS, fair_rows
from testbed.board.fair_standing import Standing, Trio
from testbed.board.fair_verdict import TASK, verdict
from testbed.board.tables import NONE, markdown, percent, points, small

HEAD = Path(__file__).with_name("fair_head.md")
COLUMNS = {
    "both, held-out wording": "both_held_out",
    "both, uncalibrated": "both_uncalibrated",
    "plain right": "plain_accuracy",
}
SHOWN = (  # in the pictures
    *("linear", TASK, "ties, density 0.2", "ties, density 0.5", "dare_ties", "slerp"),
    *("regmean", "aim", "opcm", "pcb", "wudi", RAIN, STREAMS),
)
# Pages with a table of some methods, by their names.
PARTS = {
    "comparison.md": (
        *("reasoning", CEILING),
        *SHOWN,
        "dare_linear",
        "rain projection, two models",
    ),
    "companions.md": (
        *(CEILING, TASK, "nuslerp, task vectors", "regmean", "regmean, anchored", "regmean++"),
        *("aim", "aim, shuffled channels", "opcm", "pcb", "wudi", STREAMS),
    ),
}
TRIO = """\
# {name}

<!-- Made by `python -m testbed.fair`: do not edit. -->

One of the trios of the [results](../results.md), where it says what each row is.

![Merges of {name}: plain prompts right, against right and as asked](../img/fair-{name}.svg)

*Look for* points to the right and above. Large marks are judged on the test prompts; the small \
ones beside them are all strengths that were tried, on the validation prompts. Stars are our rows.

*both*: right and as asked, percent of 322 constrained prompts. *against streams*: paired \
difference to `rain streams` at 1, in points. [a, b]: 95 % bootstrap interval over test prompts. \
*plain right*: of 150 prompts without a constraint. *whole*: one complete thinking block. *edge*: \
the best strength is at an end that could not move.

## At each row's best strength

{best}

## At strength 1, without a search

{nominal}

{missing}"""


def write_pages(out: Path, trios: Sequence[Trio]) -> None:
    """Write the page, one for each trio beside it, their pictures, and tables of other pages."""
    out.write_text(page(trios), encoding="utf-8")
    for other in PARTS:
        path = out.with_name(other)
        path.write_text(with_table(path.read_text(encoding="utf-8"), other, trios), "utf-8")
    for trio in trios:
        path = out.parent / out.stem / f"{trio.name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(trio_page(trio), encoding="utf-8")
        frontier.draw(_points(trio), f"fair-{trio.name}", trio.name)


def page(trios: Sequence[Trio]) -> str:
    """All trios: what speaks against us, the defaults, each method at its best."""
    text = HEAD.read_text(encoding="utf-8").format(
        verdict=verdict(trios),
        overview=_overview(trios),
        methods=_methods(trios),
        pages=", ".join(f"[{trio.name}](results/{trio.name}.md)" for trio in trios),
    )
    return text.rstrip("\n") + "\n"


def with_table(text: str, name: str, trios: Sequence[Trio]) -> str:
    """Another page's text with its table of methods. name: that of its file."""
    return tables.between(text, "small trios", f"\n{_methods(trios, PARTS[name])}\n")


def _overview(trios: Sequence[Trio]) -> str:
    header = ["trio", "both", "ceiling", "% of it", "best of others", "plain right"]
    header += ["whole", "L_think", "times", "uncalibrated (other kinds)"]
    lines = []
    for trio in trios:
        ours, rival = trio.ours, trio.rivals[0]
        plain, own = ours.value("plain_accuracy"), trio.best["reasoning"].value("plain_accuracy")
        left = f"{percent(rival.value('both'))} ({rival.row.name}; plain {_plain(rival)})"
        kinds = percent(ours.value("both_uncalibrated")), percent(trio.calibrated_kinds(ours))
        line = [trio.name, tables.cell(ours.entry["numbers"], "both")]
        line += [percent(trio.best[CEILING].value("both")), percent(trio.of_ceiling), left]
        line += [f"{percent(plain)} ({percent(own)})", percent(ours.whole)]
        line += [small(ours.value("L_think")), small(trio.divergence), f"{kinds[0]} ({kinds[1]})"]
        lines.append(line)
    return markdown(header, lines)


def _methods(trios: Sequence[Trio], names: Sequence[str] | None = None) -> str:
    header = ["method", *(trio.name for trio in trios)]
    lines = []
    for row in fair_rows():
        if names is not None and row.name not in names:
            continue
        found = [trio.best.get(row.name) for trio in trios]
        if any(found):
            lines.append([row.name, *(_cell(one) for one in found)])
        if row.name == STREAMS:
            lines.append([f"{STREAMS} at 1", *(_cell(trio.ours) for trio in trios)])
    return markdown(header, lines)


def _cell(one: Standing | None) -> str:
    return NONE if one is None else f"{percent(one.value('both'))} / {_plain(one)}"


def _plain(one: Standing) -> str:
    return percent(one.value("plain_accuracy"))


def trio_page(trio: Trio) -> str:
    """Every row of one trio."""
    missing = "; ".join(trio.missing)
    return TRIO.format(
        name=trio.name,
        best=_table(trio, list(trio.best.values())),
        nominal=_table(trio, list(trio.nominal.values())),
        missing=f"Not measured: {missing}.\n" if missing else "Every row is measured.\n",
    )


def _table(trio: Trio, rows: Sequence[Standing]) -> str:
    header = ["method", "strength", "tried", "both", "against streams", *COLUMNS, "whole"]
    return markdown([*header, "L_think"], [_line(trio, one) for one in rows])


def _line(trio: Trio, one: Standing) -> list[str]:
    numbers = one.entry["numbers"]
    strength = NONE if one.strength is None else f"{one.strength:g}{', edge' * one.at_edge}"
    cells = [one.row.name, strength, str(len(one.swept)) if one.swept else NONE]
    cells.append(tables.with_interval(numbers["both"]))
    apart, low, high = trio.apart(one)
    same = one.entry is trio.ours.entry
    cells.append(NONE if same else f"{points(apart)} [{points(low)}, {points(high)}]")
    cells += [percent(one.value(name)) for name in COLUMNS.values()]
    return [*cells, percent(one.whole), tables.cell(numbers, "L_think")]


def _points(trio: Trio) -> list[dict[str, Any]]:
    """What the picture shows."""
    models = [one for one in trio.best.values() if one.row.group == "models"]
    merges = [one for one in trio.best.values() if one.row.name in SHOWN]
    return [_point(one) for one in (*models, *merges)]


def _point(one: Standing) -> dict[str, Any]:
    def shares(numbers: Any) -> dict[str, Any]:
        return {"both": numbers["both"], "plain_right": numbers["plain_accuracy"]}

    swept = {
        str(strength): {name: found["value"] for name, found in shares(numbers).items()}
        for strength, numbers in one.swept.items()
    }
    point = {"name": one.row.name, "numbers": shares(one.entry["numbers"]), "swept": swept}
    return point if one.strength is None else {**point, "strength": one.strength}
