"""docs/results-projection.md and a page for each trio, made from the cache; nobody edits them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from testbed.board import across, sections, tables
from testbed.board.bench import RANDOM_SEED
from testbed.board.curves import Row, rows
from testbed.board.findings import Comparer
from testbed.board.methods import methods
from testbed.board.results_file import Results
from testbed.board.tables import NONE, markdown
from testbed.judging.intervals import RESAMPLES, SEEDS
from testbed.judging.judge import chosen
from testbed.puzzles.records import Record, read_lines

Rows = Mapping[str, Row]
ONE_TRIO = """\
**One trio, one training seed.** This is evidence about these three models; nothing here shows \
that another architecture, task or training seed would agree."""
BACK = """\
<!-- Made by `python -m testbed.scoreboard`: do not edit. -->

One of the trios of the [results](../{out}), where it says how to read these tables."""
NOTES = "notes.md"
HEAD = Path(__file__).with_name("results_head.md")


def write_page(
    out: Path, found: Sequence[Results], validation: int | None, test: int | None, *, quick: bool
) -> None:
    """Write the page and the plots beside it."""
    trios = " ".join(results.data["trio"] for results in found)
    command = f"python -m testbed.scoreboard {trios} -o {out}{' --quick' if quick else ''}"
    takeaway = f"\n{_notes(found[0], 'takeaway')}\n" if len(found) > 1 else ""
    head = HEAD.read_text(encoding="utf-8").format(
        command=command,
        takeaway=takeaway,
        seed=RANDOM_SEED,
        resamples=RESAMPLES,
        seeds=", ".join(map(str, SEEDS)),
    )
    parts = [head.rstrip("\n")]
    measured = {
        Path(results.data["trio"]).name: {
            row.method.name: row for row in rows(results, validation, test, quick=quick)
        }
        for results in found
    }
    made = {
        Path(results.data["trio"]).name: partial(
            section,
            results=results,
            complete=measured[Path(results.data["trio"]).name],
            limits=(validation, test),
            quick=quick,
        )
        for results in found
    }
    if len(found) == 1:
        parts += [ONE_TRIO, *(line for make in made.values() for line in make(out))]
    else:
        parts += ["## Findings", _notes(found[0], "all"), "## Each method at its best strength"]
        parts += [across.summary(measured), "## The targets", across.targets(measured)]
        parts += ["## Each trio", _each(out, made)]
    _write(out, parts)


def _each(out: Path, made: Mapping[str, Callable[[Path], list[str]]]) -> str:
    """A page for each trio; links to them and their plots."""
    lines = []
    for name, make in made.items():
        page = out.parent / out.stem / f"{name}.md"
        _write(page, [f"# {name}", BACK.format(out=out.name), *make(page)[1:]])
        lines.append(f"**[{name}]({out.stem}/{name}.md)**: every row and strength, with intervals.")
        image = f"img/results-{name}.svg"
        if (out.parent / image).exists():
            lines += [f"![Trade-off curves of {name}]({image})", sections.LOOK_FOR]
    return "\n\n".join(lines)


def _write(path: Path, parts: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def section(
    out: Path,
    results: Results,
    complete: Rows,
    limits: tuple[int | None, int | None],
    *,
    quick: bool,
) -> list[str]:
    """One trio."""
    trio = Path(results.data["trio"])
    validation, test = (
        chosen(read_lines(trio / f"{split}.jsonl"), limit)
        for split, limit in zip(("validation", "test"), limits, strict=True)
    )
    return [
        f"## {trio.name}",
        f"Prompts: validation {_counted(validation)}, test {_counted(test)}. "
        + _measured(complete, quick=quick),
        _notes(results, trio.name),
        "### At each method's own best strength",
        _table(complete, nominal=False),
        "### At λ = 1",
        _table(complete, nominal=True),
        *sections.curves(out, trio.name, complete),
        *sections.comparisons(complete, Comparer(test)),
        sections.attention(results, complete),
        sections.calibrations(results, complete),
        sections.timing(results),
    ]


def _notes(results: Results, name: str) -> str:
    """What is to be said by hand."""
    path = results.path.with_name(f"{name}-{NOTES}")
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def _counted(prompts: Sequence[Record]) -> str:
    return f"{len(prompts)} ({sum(bool(r['constraint']) for r in prompts)} with a constraint)"


def _measured(complete: Rows, *, quick: bool) -> str:
    wanted = [method.name for method in methods() if method.main or not quick]
    missing = [name for name in wanted if name not in complete]
    said = f"Rows measured: {len(complete)} of {len(wanted)}"
    return (
        f"{said}; not measured for want of time: {'; '.join(missing)}." if missing else f"{said}."
    )


def _table(complete: Rows, *, nominal: bool) -> str:
    lines = []
    for name, row in complete.items():
        entry = row.nominal if nominal else row.test
        if entry is not None:
            strength = 1.0 if nominal else row.best
            lines.append(tables.line(name, f"{strength:g}" if strength else NONE, entry["numbers"]))
    return markdown(tables.header(), lines)
