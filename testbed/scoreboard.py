"""Compare settings of the projection on trained trios and write the page that says how they did.

`python -m testbed.scoreboard TRIO_DIR [TRIO_DIR ...] -o docs/results-projection.md [--quick]`

Strengths are swept on validation prompts; the best one (most answers both right and as asked) and
λ = 1 are then judged on the test prompts. What was measured before is not measured again.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from testbed.board.attention import has_family
from testbed.board.bench import Bench, digest
from testbed.board.curves import NOMINAL, best_strength, rows
from testbed.board.methods import Method, methods
from testbed.board.page import write_page
from testbed.board.results_file import Results
from testbed.board.sections import ATTENTION, attention_label

LOG = logging.getLogger(__name__)
RESULTS = Path("testbed/results")
VALIDATION = 70
QUICK_LIMIT = 60


@dataclass(frozen=True)
class Plan:
    """Prompts with a constraint per split (half as many without; None: all), and when to end."""

    validation: int | None
    test: int | None
    quick: bool
    core: bool
    only: tuple[str, ...]
    deadline: float

    def takes(self, method: Method) -> bool:
        """Whether this row is to be measured."""
        if self.only:
            return method.name in self.only
        return (method.main or not self.quick) and (method.core or not self.core)

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline


def run_method(bench: Bench, results: Results, method: Method, plan: Plan) -> bool:
    """Sweep, choose, judge on test; False if time was up before the row was complete."""

    def measured(strength: float, split: str, limit: int | None) -> bool:
        if results.get(method.name, strength, split, limit) is None:
            if plan.late:
                return False
            entry = bench.measure(method, strength, split, limit)
            results.put(entry, method.name, strength, split, limit)
        return True

    strengths = method.swept(quick=plan.quick)
    if not all(measured(s, "validation", plan.validation) for s in strengths):
        return False
    swept = {
        s: results.entries[Results.key(method.name, s, "validation", plan.validation)]["numbers"]
        for s in strengths
    }
    best = best_strength(swept)
    comparable = method.settings is not None or method.main
    nominal = [NOMINAL] if comparable and NOMINAL in strengths else []
    return all(measured(s, "test", plan.test) for s in dict.fromkeys([best, *nominal]))


def run_trio(trio: Path, plan: Plan) -> Results:
    """All rows that time allows."""
    results = Results(RESULTS / f"{trio.name}.json", str(trio), digest(trio))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(trio, Path(folder))
        for method in methods():
            if not plan.takes(method):
                continue
            start = time.monotonic()
            done = run_method(bench, results, method, plan)
            results.calibrations.update(bench.calibrations)
            LOG.info("%s: %s, %.0f s", method.name, done, time.monotonic() - start)
        if not plan.late:
            measure_attention(bench, results, plan)
    results.save()
    return results


def measure_attention(bench: Bench, results: Results, plan: Plan) -> None:
    """Instruction attention of the rows that the page shows it for, at their best strengths."""
    if not has_family(bench.trio):
        return
    complete = rows(results, plan.validation, plan.test, quick=plan.quick)
    for row in complete:
        label = attention_label(row)
        if row.method.name in ATTENTION and label not in results.attention:
            results.attention[label] = dict(bench.attention(row.method, row.best))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trios", type=Path, nargs="+")
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/results-projection.md"))
    parser.add_argument(
        "--quick", action="store_true", help="main rows, three strengths, 90 prompts"
    )
    parser.add_argument(
        "--limit", type=int, help=f"validation prompts with a constraint ({VALIDATION})"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="measure no longer")
    parser.add_argument("--core", action="store_true", help="the rows that every trio gets")
    parser.add_argument("--rows", nargs="+", default=(), metavar="ROW", help="only these rows")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("mergekit").setLevel(logging.WARNING)
    minutes = 0.0 if options.page_only else options.minutes
    plan = Plan(
        validation=options.limit or (QUICK_LIMIT if options.quick else VALIDATION),
        test=QUICK_LIMIT if options.quick else None,
        quick=options.quick,
        core=options.core,
        only=tuple(options.rows),
        deadline=time.monotonic() + 60 * minutes,
    )
    found = [run_trio(trio, plan) for trio in options.trios]
    write_page(options.out, found, plan.validation, plan.test, quick=options.quick)


if __name__ == "__main__":
    main()
