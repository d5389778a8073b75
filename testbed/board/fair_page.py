"""The page of the fair scoreboard, made from its JSON alone."""

from collections.abc import Sequence
from pathlib import Path

from testbed.board import tables
from testbed.board.curves import best_strength
from testbed.board.fair_rows import FairRow, fair_rows
from testbed.board.fair_run import TEST, curve
from testbed.board.recipes import ROLES
from testbed.board.results_file import Entry, Results
from testbed.board.tables import NONE, markdown

HEAD = """\
# Fair scoreboard

<!-- Made by `python -m testbed.fair`: do not edit. -->

Every row gets five strengths, each √2 times the one before, and more at an edge until the best is \
inside (or the edge is a model itself). Strengths are chosen on all validation prompts, and what \
the table shows is measured on the test prompts. All merges are computed in float32 and cast to \
bfloat16 once. *tried*: how many strengths. *edge*: the best is at an end that could not move. \
[a, b]: 95 % bootstrap interval over test prompts. The strength of `rain streams` is \
`teacher_strength`, calibrated anew at λ = 1.

Which methods and defaults there are was decided with test prompts of these trios in sight; no \
strength was. One training seed a trio: nothing here says that another one would agree."""
NUMBERS = ("both", "plain_accuracy", "no_close", "no_thinking", "L_think")
HEADER = [
    "method",
    "strength",
    "tried",
    "both",
    "plain right",
    "no close",
    "no thinking",
    "L_think",
]
ONE = "At strength 1, without a search:"


def page(trios: Sequence[Results]) -> str:
    """All trios, one table each for the chosen strength and for strength 1."""
    parts = [HEAD]
    for results in trios:
        parts += [f"## {Path(results.data['trio']).name}", *_tables(results)]
    return "\n\n".join(parts) + "\n"


def _tables(results: Results) -> list[str]:
    best, nominal, missing = [], [], []
    for row in fair_rows():
        found = curve(results, row)
        strength = 0.0 if row.name in ROLES else best_strength(found) if found else None
        entry = None if strength is None else _test(results, row, strength)
        if entry is None:
            missing.append(row.name)
            continue
        best.append(_line(row, strength or 0.0, list(found), entry))
        one = _test(results, row, row.nominal) if row.nominal is not None else None
        if one is not None:
            nominal.append(_line(row, 1.0, list(found), one))
    said = f"Not measured yet: {'; '.join(missing)}." if missing else "Every row is measured."
    found_at_one = [ONE, markdown(HEADER, nominal)] if nominal else []
    return [markdown(HEADER, best), *found_at_one, said]


def _test(results: Results, row: FairRow, strength: float) -> Entry | None:
    return results.get(row.name, strength, TEST, None)


def _line(row: FairRow, strength: float, tried: Sequence[float], entry: Entry) -> list[str]:
    text = f"{strength:g}" if tried else NONE
    if tried and strength in (min(tried), max(tried)):
        text += ", edge"
    cells = [tables.cell(entry["numbers"], name) for name in NUMBERS]
    return [row.name, text, str(len(tried)) if tried else NONE, *cells]
