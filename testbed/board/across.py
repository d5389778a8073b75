"""What several trios say together: means over training seeds, and the targets."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev

from testbed.board.curves import NOMINAL, Row, at_gain, safe_gain, undominated
from testbed.board.methods import BASE, DEFAULT, HEAD, TASK
from testbed.board.tables import NONE, markdown, percent, small

Trios = Mapping[str, Mapping[str, Row]]
RIVALS = (TASK, "ties", "dare_ties")
SUMMARY = """\
Test prompts, each method at the strength that validation chose for it on each trio; a family \
with several training seeds has mean ± standard deviation over those that have the row (their \
number in brackets). Plain accuracy is that of answers without a constraint."""
TARGETS = """\
What rain is held to. *L_think*: at the constraint gain that task_arithmetic reaches at its own \
best λ, as a share of task_arithmetic's L_think at λ = 1 (at most 0.01 wanted) and at its best λ \
(at most 0.1), on validation prompts; {none}: the curve never gets there. *broken*: points of \
thinking blocks broken beyond the reasoning model's own (0 wanted); *reasoning*: points of plain \
accuracy lost (at most 1); both on test prompts, at the row's best λ and at λ = 1. *safe*: the \
most that is followed on validation prompts with reasoning within one point and no more broken \
blocks, beside task_arithmetic's. *not dominated*: rivals with a strength at which no point of \
the row follows as much at no more L_think (none wanted)."""


def families(trios: Trios) -> dict[str, list[str]]:
    """Names of trios that differ by their training seed alone, by what they have in common."""
    found: dict[str, list[str]] = {}
    for name in trios:
        found.setdefault(name.rpartition("-s")[0], []).append(name)
    return found


def summary(trios: Trios) -> str:
    """One line a method: how it does on each family."""
    groups = families(trios)
    header = ["method"]
    for family in groups:
        header += [f"{family}: both", "plain accuracy", "content lost", "L_think"]
    names = list(dict.fromkeys(name for rows in trios.values() for name in rows))
    lines = []
    for name in names:
        line = [name]
        for members in groups.values():
            rows = [trios[trio][name] for trio in members if name in trios[trio]]
            line += _family(rows)
        lines.append(line)
    return f"{SUMMARY}\n\n{markdown(header, lines)}"


def _family(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return [NONE] * 4
    shares = [_spread(rows, name, percent) for name in ("both", "plain_accuracy", "content_lost")]
    both = f"{shares[0]} ({len(rows)})" if len(rows) > 1 else shares[0]
    return [both, *shares[1:], _spread(rows, "L_think", small)]


def _spread(rows: Sequence[Row], name: str, say: Callable[[float], str]) -> str:
    values = [value_on_test(row, name) for row in rows]
    mean = say(fmean(values))
    return f"{mean} ± {say(stdev(values))}" if len(values) > 1 else mean


def value_on_test(row: Row, name: str, *, nominal: bool = False) -> float:
    """A number on the test prompts."""
    entry = row.nominal if nominal else row.test
    return float(entry["numbers"][name]["value"]) if entry else float("nan")


def targets(trios: Trios) -> str:
    """Whether what was hoped for holds, trio by trio."""
    header = [
        *("trio", "method", "best λ", "of L_think at λ = 1", "of L_think at its best λ"),
        *("broken", "reasoning", "safe", "not dominated"),
    ]
    lines = [
        [trio, name, *_target(rows, rows[name])]
        for trio, rows in trios.items()
        for name in (DEFAULT, BASE, HEAD)
        if {name, TASK, "reasoning"} <= set(rows)
    ]
    return f"{TARGETS.format(none=NONE)}\n\n{markdown(header, lines)}"


def _target(rows: Mapping[str, Row], row: Row) -> list[str]:
    task, anchor = rows[TASK], rows["reasoning"]
    cost = at_gain(row, task.value(task.best, "followed"))
    prices = task.value(NOMINAL, "L_think"), task.value(task.best, "L_think")
    ratios = [NONE if cost is None else small(cost / price) for price in prices]
    right = value_on_test(anchor, "plain_accuracy")
    lost = [right - value_on_test(row, "plain_accuracy", nominal=one) for one in (False, True)]
    broken = [_broken(row, nominal=one) - _broken(anchor, nominal=False) for one in (False, True)]
    safe = [safe_gain(one, anchor) for one in (row, task)]
    gains = " beside ".join(NONE if one is None else percent(one[0]) for one in safe)
    left = [
        name for name in RIVALS if name in rows and undominated(row, rows[name], "L_think", 1.0)
    ]
    return [
        f"{row.best:g}",
        *ratios,
        "/".join(_points(value) for value in broken),
        "/".join(_points(value) for value in lost),
        gains,
        ", ".join(left) or "none",
    ]


def _points(value: float) -> str:
    """In points, never a negative zero."""
    return percent(0.0 if abs(value) < 0.005 else value)


def _broken(row: Row, *, nominal: bool) -> float:
    return sum(value_on_test(row, name, nominal=nominal) for name in ("no_close", "no_thinking"))
