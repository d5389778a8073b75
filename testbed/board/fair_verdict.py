"""The first paragraph of docs/results.md: what the defaults reach, and what speaks against them."""

from collections.abc import Sequence

from testbed.board.fair_standing import Standing, Trio
from testbed.board.tables import percent

TASK = "task_arithmetic"
WANTED, WHOLE, LOST, DIVERGENCE, UNSEEN = 0.85, 0.98, 0.01, 0.1, 0.8


def verdict(trios: Sequence[Trio]) -> str:
    """What the goals are, and where each is missed."""
    shares = sorted(trio.of_ceiling for trio in trios)
    ahead = [trio for trio in trios if trio.ours.value("both") >= trio.rivals[0].value("both")]
    said = (
        f"**With its defaults and no search, stream matching reaches {percent(shares[0])} to "
        f"{percent(shares[-1])} % of the ceiling on {len(trios)} trios, and has as many answers "
        "right and as asked as any rival at its best strength, or more, on "
        f"{len(ahead)} of them.** "
    )
    against = [part for part in _against(trios) if part]
    return said + (
        f"What speaks against it: {'; '.join(against)}." if against else "No goal is missed."
    )


def _against(trios: Sequence[Trio]) -> list[str]:
    return [
        _listed(
            "less than 85 % of the ceiling on",
            [f"{t.name} ({percent(t.of_ceiling)} %)" for t in trios if t.of_ceiling < WANTED],
        ),
        _listed("rivals have more on", [_rivals(t, t.rivals) for t in trios]),
        _listed(
            "our own projection, at its best strength, has more on",
            [_rivals(t, t.projections) for t in trios],
        ),
        _listed(
            "more than a point of plain accuracy is lost on",
            [
                f"{t.name} ({percent(t.ours.value('plain_accuracy'))} of {percent(_own(t))})"
                for t in trios
                if _own(t) - t.ours.value("plain_accuracy") > LOST + 1e-9
            ],
        ),
        _listed(
            "less than 98 % of the thinking blocks are whole on",
            [f"{t.name} ({percent(t.ours.whole)})" for t in trios if t.ours.whole < WHOLE],
        ),
        _listed(
            f"L_think is more than a tenth of that of `{TASK}` on",
            [f"{t.name} ({t.divergence:.2f})" for t in trios if t.divergence > DIVERGENCE],
        ),
        _listed(
            "the constraint that no calibration text shows is followed less than 80 % as often as "
            "the others on",
            [
                f"{t.name} ({percent(seen)} against {percent(t.calibrated_kinds(t.ours))})"
                for t in trios
                if (seen := t.ours.value("both_uncalibrated")) < UNSEEN * t.calibrated_kinds(t.ours)
            ],
        ),
    ]


def _own(trio: Trio) -> float:
    return trio.best["reasoning"].value("plain_accuracy")


def _rivals(trio: Trio, rows: Sequence[Standing]) -> str:
    """Which of these have more right and as asked, and their plain accuracy; else nothing."""
    ours = trio.ours.value("both")
    found = [
        f"`{one.row.name}` {percent(one.value('both'))}, plain "
        f"{percent(one.value('plain_accuracy'))}"
        for one in rows
        if one.value("both") > ours
    ]
    here = f"ours {percent(ours)}, plain {percent(trio.ours.value('plain_accuracy'))}"
    return f"{trio.name} ({', '.join(found)}; {here})" if found else ""


def _listed(what: str, found: Sequence[str]) -> str:
    there = [one for one in found if one]
    return f"{what} {', '.join(there)}" if there else ""
