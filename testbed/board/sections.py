"""Parts of a trio's section: curves, comparisons, ranks, cost."""

from collections.abc import Mapping
from pathlib import Path

from testbed.board import findings
from testbed.board.curves import Row, at_gain, safe_gain, undominated
from testbed.board.findings import Comparer, Comparison
from testbed.board.methods import BASE, DEFAULT, PROMPT, TASK
from testbed.board.results_file import Results
from testbed.board.tables import NONE, markdown, percent, points, small

Rows = Mapping[str, Row]
EQUAL = """\
At equal gain: {level} % followed, which task_arithmetic reaches at its best λ ({best:g}) with \
L_think {price}{nominal}. Linear between strengths; {none} where a curve never gets there. *safe*: \
the most that is followed with reasoning within one point of the reasoning model's and no more \
broken blocks, and the λ for it."""
DOMINANCE = """\
Where *{default}* does not dominate: the strengths of each rival at which no point of its curve \
follows as much at no more L_think, or as much with no less plain accuracy. *none*: it dominates."""
COMPARISONS = """\
First less second, in points on the same constrained test prompts, with the paired 95 % interval: \
*both* with each at its own best strength, right answers there whatever their format, and *both* \
with both at λ = 1. Many comparisons are made: some verdicts are chance."""
ATTENTION = (
    *("reasoning", "instruct", TASK, DEFAULT, BASE, PROMPT),
    *(f"{BASE}, normalized rho 1", f"{DEFAULT}, normalized rho 1"),
)
ATTENDING = """\
How much of the attention of the words that follow a constraint goes to it, less how much the \
lead of the answer pays it; in brackets the first of the two. Mean over heads and 70 test \
prompts, right answers teacher-forced."""
KINDS = {
    "both at best λ": (False, "both"),
    "right at best λ": (False, "accurate"),
    "both at λ = 1": (True, "both"),
}

LOOK_FOR = (
    "*Look for* curves that run high and to the left: more answers as asked for less drift. "
    "Each point is a strength, on validation prompts."
)


def curves(out: Path, trio: str, complete: Rows) -> list[str]:
    """The plot, and what it says in numbers."""
    from testbed.board.plots import draw  # noqa: PLC0415 - matplotlib is wanted for the page alone

    anchor, task = complete.get("reasoning"), complete.get(TASK)
    if anchor is None or task is None:
        return []
    folder = out.parent if out.stem == "results" else out.parent.parent
    image = folder / "img" / f"results-{trio}.svg"
    draw(image, list(complete.values()), anchor, f"{trio}, validation prompts, one point per λ")
    return [
        "### The trade-off",
        f"![Trade-off curves of {trio}]({'' if folder == out.parent else '../'}img/{image.name})",
        LOOK_FOR,
        equal_gain(complete, anchor, task),
        dominance(complete),
    ]


def equal_gain(complete: Rows, anchor: Row, task: Row) -> str:
    """What each method pays where it follows as much as task arithmetic does at its best λ."""
    level, price = (task.value(task.best, name) for name in ("followed", "L_think"))
    lines = []
    for name, row in complete.items():
        if row.method.group != "models":
            cost, both, safe = (
                at_gain(row, level),
                at_gain(row, level, "both"),
                safe_gain(row, anchor),
            )
            paid = [NONE] * 2 if cost is None else [small(cost), small(cost / price)]
            kept = [NONE] * 2 if safe is None else [percent(safe[0]), f"{safe[1]:g}"]
            lines.append([name, *paid, NONE if both is None else percent(both), *kept])
    at_one = f" (at λ = 1: {small(task.value(1.0, 'L_think'))})" if 1.0 in task.curve else ""
    text = EQUAL.format(
        level=percent(level), best=task.best, price=small(price), nominal=at_one, none=NONE
    )
    header = ["method", "L_think", "times task_arithmetic's", "both there", "safe: followed", "λ"]
    return f"{text}\n\n{markdown(header, lines)}"


def dominance(complete: Rows) -> str:
    """Where a rival's point is not matched by any point of the default's curve."""
    default = complete.get(DEFAULT)
    if default is None:
        return ""
    lines = []
    for name, rival in complete.items():
        if rival.method.group == "models" or name == DEFAULT:
            continue
        ways = (("L_think", 1.0), ("plain_accuracy", -1.0))
        left = [undominated(default, rival, cost, sign) for cost, sign in ways]
        lines.append([name, *(", ".join(f"{s:g}" for s in found) or "none" for found in left)])
    header = ["rival", "not matched in L_think, at λ", "not matched in accuracy, at λ"]
    return f"{DOMINANCE.format(default=DEFAULT)}\n\n{markdown(header, lines)}"


def comparisons(complete: Rows, comparer: Comparer) -> list[str]:
    """Every group of pairs of which at least one was measured."""
    parts = ["### Comparisons", COMPARISONS]
    for title, pairs in findings.GROUPS.items():
        lines = [line for pair in pairs if (line := _compared(complete, comparer, pair))]
        if lines:
            header = ["first", "second", *(c for k in KINDS for c in (k, "verdict"))]
            parts += [f"**{title}**", markdown(header, lines)]
    return parts


def _compared(complete: Rows, comparer: Comparer, pair: tuple[str, str]) -> list[str]:
    found = [
        comparer.compare(complete, pair, nominal=nominal, field=field)
        for nominal, field in KINDS.values()
    ]
    if found[0] is None:
        return []
    return [*pair, *(text for one in found for text in _said(one))]


def _said(found: Comparison | None) -> tuple[str, str]:
    if found is None:
        return NONE, NONE
    return f"{points(found.apart)} [{points(found.low)}, {points(found.high)}]", found.verdict


def attention_label(row: Row) -> str:
    """The key of a row's attention in the cache."""
    return f"{row.method.name} | {row.best:g}"


def attention(results: Results, complete: Rows) -> str:
    """Instruction attention per layer, before and after."""
    lines = []
    for name, row in complete.items():
        found = results.attention.get(attention_label(row))
        if name in ATTENTION and found is not None:
            pairs = zip(found["alignment"], found["leakage"], strict=True)
            cells = [f"{a - u:+.3f} ({a:.3f})" for a, u in pairs]
            lines.append([name, f"{row.best:g}" if row.best else NONE, *cells])
    if not lines:
        return ""
    layers = [f"layer {index}" for index in range(len(lines[0]) - 2)]
    table = markdown(["method", "λ", *layers], lines)
    return f"### Attention to the instruction\n\n{ATTENDING}\n\n{table}"


def calibrations(results: Results, complete: Rows) -> str:
    """Ranks of the calibrations behind the rows that are shown."""
    lines = [
        [name, f"{entry['mean_rank']:.0f}", f"{entry['capped']} of {entry['sites']}"]
        for name, entry in sorted(results.calibrations.items())
        if name in complete
    ]
    return "### Ranks\n\n" + markdown(["calibration", "mean rank", "sites at the cap"], lines)


def timing(results: Results) -> str:
    """CPU time, which depends less on what else a machine does than wall time."""
    spent = [entry["cpu_seconds"] for entry in results.entries.values()]
    making, judging = (sum(one[kind] for one in spent) / 60 for kind in ("making", "judging"))
    return (
        f"### Cost\n\n{len(spent)} measurements on one thread: {making:.0f} CPU minutes for "
        f"calibrating and merging, {judging:.0f} for generating and judging."
    )
