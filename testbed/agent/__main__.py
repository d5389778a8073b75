"""The other direction on tiny models: make the agent, fill the board, write its page.

python -m testbed.agent make --out DIR
python -m testbed.agent board --trio DIR [--work DIR]
python -m testbed.agent head --trio DIR
python -m testbed.agent page
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from testbed.agent.board import RESULTS, fill
from testbed.agent.making import write_prompts, write_sets
from testbed.agent.page import write_page
from testbed.agent.reading import reading
from testbed.agent.training import train
from testbed.language.judging import write_json


def make(options: argparse.Namespace) -> None:
    """The models that are not there yet, and their files."""
    train(options.out, options.scale)
    write_prompts(options.out)
    write_sets(options.out)


def board(options: argparse.Namespace) -> None:
    """All rows, or those named."""
    fill(options.trio, options.work or options.trio / "work", options.results, options.rows)


def head(options: argparse.Namespace) -> None:
    """How the agent's head reads the donor's states, beside the rows."""
    found = json.loads(options.results.read_text(encoding="utf-8"))
    write_json(options.results, {**found, "reading": reading(options.trio)})


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("make", help="train the models, write prompts and sets")
    making.add_argument("--out", type=Path, required=True)
    making.add_argument(
        "--scale", type=float, default=1.0, help="share of the steps, to try things out"
    )
    making.set_defaults(run=make)
    filling = commands.add_parser("board", help="judge the models and merges")
    filling.add_argument("--trio", type=Path, required=True, help="what `make` wrote")
    filling.add_argument("--work", type=Path, help="for merges on the way")
    filling.add_argument("--rows", nargs="+", default=(), metavar="NAME", help="only these")
    filling.add_argument("--results", type=Path, default=RESULTS)
    filling.set_defaults(run=board)
    heading = commands.add_parser("head", help="how the agent's head reads the donor's states")
    heading.add_argument("--trio", type=Path, required=True)
    heading.add_argument("--results", type=Path, default=RESULTS)
    heading.set_defaults(run=head)
    paging = commands.add_parser("page", help="write the page's part from the results")
    paging.set_defaults(run=lambda _: write_page())
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options.run(options)


if __name__ == "__main__":
    main()
