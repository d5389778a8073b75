"""What docs/companions.md says of RCP-Merging's vote, from the rows of one trio."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from testbed.board.tables import between, markdown, percent, points
from testbed.language.board import load_rows
from testbed.language.page import strengths
from testbed.language.table import table
from testbed.language.voting import EVEN, FACTS, RANDOM, VOTE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "companions.md"
ROWS = Path("trio-s0-third") / "vote"
COLUMNS = {
    "plain right": "plain_right",
    "whole, constrained": "whole_constrained",
    "followed": "followed",
    "both": "both",
    "right, followed and thought": "all_three",
    "L_think": "L_think",
}
COMPARED = {
    "both": "both",
    "all_three": "right, followed and thought",
    "plain_right": "plain right",
}
Found = Mapping[str, Any]


def write_page(results: Path) -> Path:
    """Put what is written from rows into the page. results: the folder of all trios' rows."""
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    return PAGE


def written(text: str, results: Path) -> str:
    """The page's text with the parts that are written from rows."""
    rows = load_rows(results / ROWS)
    facts = json.loads((results / ROWS / FACTS).read_text(encoding="utf-8"))
    text = between(text, "language vote verdict", verdict(facts) + "\n")
    text = between(text, "language vote masks", masks(facts) + "\n")
    text = between(text, "language vote table", "\n" + table(rows, COLUMNS) + "\n")
    text = between(text, "language vote differences", "\n" + differences(facts) + "\n")
    return between(text, "language vote strengths", "\n" + strengths(rows) + "\n")


def verdict(facts: Found) -> str:
    """It is built if one of the two votes beats its random masks outside of the interval."""
    against = [one for one in facts["comparisons"] if one["second"].startswith(RANDOM)]
    said = "; ".join(
        f"`{one['first']}` less `{one['second']}` {_apart(one, 'both')}" for one in against
    )
    told = f"In *both*, in points on the same test prompts: {said}."
    if any(_beats(vote, against) for vote in (VOTE, EVEN)):
        return f"**To be built: a vote beats a random mask.** {told}"
    return f"**Not built: no vote beats a random mask as dense in each tensor.** {told}"


def _beats(vote: str, against: Sequence[Found]) -> bool:
    controls = [one["difference"]["both"] for one in against if one["first"] == vote]
    return bool(controls) and all(low > 0 for _, low, _ in controls)


def masks(facts: Found) -> str:
    """How much each vote takes, and how well it repeats."""
    said = []
    for name in (VOTE, EVEN):
        penalty = f"{facts['penalties'][name]:.3g}"
        said.append(
            f"`{name}` (penalty {penalty}) takes {percent(facts['density'][name])} % of all "
            f"elements, and two halves of the texts decide alike on "
            f"{percent(facts['agreement'][name])} % of them"
        )
    return "; ".join(said) + "."


def differences(facts: Found) -> str:
    """First less second, with the paired intervals."""
    lines = [
        [f"{one['first']} less {one['second']}", *(_apart(one, name) for name in COMPARED)]
        for one in facts["comparisons"]
    ]
    return markdown(["", *COMPARED.values()], lines)


def _apart(one: Found, name: str) -> str:
    value, low, high = (points(found) for found in one["difference"][name])
    return f"{value} [{low}, {high}]"
