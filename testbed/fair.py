"""Compare methods on trained trios with the same chances for every row.

`python -m testbed.fair [TRIO_DIR ...] [--rows ROW ...] [--minutes M] [-o docs/results.md]`

Numbers go to testbed/results/fair/TRIO.json; what was measured before is not measured again. The
page is made from all that is there, so without a trio it is written anew and nothing is measured.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from testbed.board.bench import digest
from testbed.board.fair_page import write_pages
from testbed.board.fair_rows import fair_rows
from testbed.board.fair_run import FairBench, calibrated_without, run_all
from testbed.board.fair_standing import Trio, prompt_facts
from testbed.board.results_file import Results, kept
from testbed.puzzles.records import read_lines

RESULTS = Path("testbed/results/fair")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trios", type=Path, nargs="*")
    parser.add_argument("-o", "--out", type=Path, help="write the page here")
    names = [row.name for row in fair_rows()]
    parser.add_argument("--rows", nargs="+", default=names, choices=names, metavar="ROW")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="measure no longer")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("mergekit").setLevel(logging.WARNING)
    end = time.monotonic() + 60 * options.minutes
    wanted = [row for row in fair_rows() if row.name in options.rows]
    for trio in options.trios:
        with tempfile.TemporaryDirectory() as folder:
            seen = calibrated_without(trio, Path(folder) / trio.name)
            results = Results(RESULTS / f"{trio.name}.json", trio.name, digest(seen))
            results.data["prompts"] = prompt_facts(read_lines(trio / "test.jsonl"))
            run_all(FairBench(seen, Path(folder)), results, wanted, lambda: time.monotonic() > end)
            results.save()
    if options.out is not None:
        write_pages(options.out, [Trio(kept(path)) for path in sorted(RESULTS.glob("*.json"))])


if __name__ == "__main__":
    main()
