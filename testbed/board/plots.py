"""Trade-off curves: what each method gains in constraints, and what it pays."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from testbed.board.curves import Row
from testbed.board.methods import BASE, DEFAULT, HEAD, TASK, TASK_LINEAR

# Colours that stay apart in grey and for colour-blind eyes; baselines are dashed.
STYLES: Mapping[str, tuple[str, str, str]] = {
    TASK: ("#7f7f7f", "--", "o"),
    TASK_LINEAR: ("#000000", "--", "s"),
    "ties, reasoning whole": ("#a6761d", "--", "^"),
    "dare_ties, reasoning whole": ("#e6ab02", "--", "v"),
    "della, reasoning whole": ("#666666", ":", "x"),
    "slerp": ("#b3b3b3", "--", "D"),
    "random subspace": ("#cc79a7", ":", "o"),
    "shrunk task vector": ("#cc79a7", ":", "s"),
    "sigmoid projection 0.1": ("#009e73", ":", "^"),
    "rain stage 2 only": ("#56b4e9", ":", "D"),
    "rain orthogonal 0.99, thinking 0": ("#d55e00", "-", "v"),
    "rain orthogonal 0.99, thinking 1": ("#d55e00", "-", "s"),
    BASE: ("#56b4e9", "-", "D"),
    HEAD: ("#009e73", "-", "*"),
    DEFAULT: ("#0072b2", "-", "o"),
}
Value = Callable[[Row, float], float]


def draw(path: Path, rows: Sequence[Row], anchor: Row, title: str) -> None:
    """Write one SVG with two panels that share the gain as their vertical axis."""
    names = {row.method.name: row for row in rows}
    base = anchor.value(anchor.best, "plain_accuracy")
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, style in STYLES.items():
        if name in names:
            _line(left, names[name], style, lambda row, s: max(row.value(s, "L_think"), 1e-6))
            _line(
                right,
                names[name],
                style,
                lambda row, s: 100 * (base - row.value(s, "plain_accuracy")),
            )
    left.set(
        xscale="log", xlabel="L_think (log scale)", ylabel="constraints followed, points gained"
    )
    right.set(xlabel="plain accuracy lost, points", xlim=(-2, 102))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "scoreboard", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def _line(axes: Axes, row: Row, style: tuple[str, str, str], cost: Value) -> None:
    colour, dash, marker = style
    strengths = sorted(row.curve)
    axes.plot(
        [cost(row, s) for s in strengths],
        [100 * row.value(s, "followed") for s in strengths],
        color=colour,
        linestyle=dash,
        marker=marker,
        markersize=4,
        linewidth=1.4,
        label=row.method.name,
    )
