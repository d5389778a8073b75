"""`mergekit-rain verify`: what a merge did to the reasoning model's thinking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from rain_mergekit.commands.json_output import json_option, print_json
from rain_mergekit.commands.options import (
    Loading,
    MarkerPairs,
    Talk,
    budget_option,
    device_option,
    dtype_option,
    given_markers,
    loading_options,
    markers_option,
    output_options,
    pick_device,
    pick_dtype,
    template_option,
    threads_option,
    typed,
)
from rain_mergekit.errors import RainError

if TYPE_CHECKING:
    from rain_mergekit.commands.console import Console
    from rain_mergekit.evaluation.answers import Behaviour
    from rain_mergekit.evaluation.texts import Texts
    from rain_mergekit.evaluation.verify import VerificationResult
    from rain_mergekit.instructions.prompts import Asked
    from rain_mergekit.text.calibration_sets import DataSet
    from rain_mergekit.text.markers import Markers


_DAMAGED = 3
_PROMPTS = 64  # of our own, where nobody has named any texts


@dataclass(frozen=True)
class VerifyCommandOptions:
    """What the command line says."""

    merged: str
    against: str | None
    reasoning_data: str | None
    samples: int | None
    max_tokens: int | None
    window: int
    markers: MarkerPairs
    chat_template_kwargs: dict[str, Any]
    generate: int | None
    prompts: str | None
    max_new_tokens: int
    card: bool
    as_json: bool
    threads: int | None
    activation_budget: int
    device: str
    dtype: str | None
    loading: Loading
    talk: Talk


@click.command(
    epilog="\b\nExample:\n  mergekit-rain verify ./merged --reasoning-data held-out.jsonl "
    "--samples 32"
)
@click.argument("merged")
@click.option(
    "--against",
    metavar="REASONING",
    help="The reasoning model  [default: the one that MERGED was made from]",
)
@click.option(
    "--reasoning-data",
    type=click.Path(),
    help="Samples with thinking, best not those of the calibration. Without them only answers are "
    "measured.",
)
@click.option("--samples", type=click.IntRange(min=1), help="Use this many, evenly spaced.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Skip samples that are longer.")
@click.option("--window", type=click.IntRange(min=0), default=5, show_default=True)
@markers_option
@template_option
@click.option(
    "--generate",
    type=click.IntRange(min=1),
    metavar="N",
    help="Let both models answer N prompts too; they are loaded as a whole for that  [default: 64 "
    "without --reasoning-data, else none]",
)
@click.option(
    "--prompts",
    metavar="FILE",
    help="Where the prompts are, with IFEval's `instruction_id_list` and `kwargs` or without; or "
    "hub:OWNER/NAME[:SPLIT[:COLUMN]], a data set of the hub  [default: those of the reasoning "
    "data; without it some that come with the package]",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=8192,
    show_default=True,
    help="Longest answer; too short a limit cuts thinking off.",
)
@json_option
@click.option("--card", is_flag=True, help="Write what is measured into MERGED's model card.")
@budget_option
@device_option()
@dtype_option()
@threads_option
@loading_options
@output_options
@typed(VerifyCommandOptions)
def verify(options: VerifyCommandOptions) -> None:
    """Compare MERGED with the reasoning model, token by token, on texts with thinking.

    L_think is the mean KL divergence at the think positions: the markers and the tokens around
    them. Up to 0.01 the format is kept; above 0.05, or if --generate shows more broken thinking
    blocks, loops, other languages, wrong answers or instructions not followed than chance
    explains, it is damaged (exit code 3). One layer of each model is in memory at a time; answers
    need them whole.
    """
    from rain_mergekit.commands import verify_text  # noqa: PLC0415 - keeps --help fast
    from rain_mergekit.commands.run_verification import ask_both, measure_on  # noqa: PLC0415
    from rain_mergekit.dequantize.plain_view import open_plain  # noqa: PLC0415
    from rain_mergekit.evaluation.layerwise_drift import VerifyOptions  # noqa: PLC0415
    from rain_mergekit.evaluation.verify import verdict  # noqa: PLC0415

    if options.card and options.reasoning_data is None:
        raise click.UsageError("--card needs --reasoning-data: it records divergences")
    console = options.talk.console(quiet=options.as_json)
    console.setup()
    load = options.loading.options()
    device, dtype = pick_device(options.device), pick_dtype(options.dtype)
    if options.card:
        _check_folder(options.merged)
    how = VerifyOptions(load, device, dtype, options.activation_budget)
    against = options.against or _made_from(options.merged)
    reasoning, merged = (open_plain(name, load) for name in (against, options.merged))
    asked, texts = _asked(options), _texts(options)
    found = data = None
    if texts.path:
        found, data = measure_on(reasoning, merged, texts, how, console, options.threads)
        for line in verify_text.verification_lines(found, all_of_them=console.verbosity > 0):
            console.print(line)
    answers: dict[str, Behaviour] = {}
    if asked:
        models, limit = {"reasoning": reasoning, "merged": merged}, options.max_new_tokens
        answers = ask_both(models, asked, (texts, limit, how), console, options.threads)
        for line in verify_text.behaviour_lines(answers):
            console.print(line)
    drift = None if found is None else found.drift
    said = verdict(drift, answers.get("merged"), answers.get("reasoning"))
    console.print(f"Measured: {verify_text.measured(drift, answers)}")
    console.heading(f"Verdict: {verify_text.verdict_line(said, answers)}")
    if options.as_json:
        print_json("verify", verify_text.content(said, found, answers))
    if options.card and found is not None and data is not None:
        _write_card(options.merged, found, data, console)
    if said == "damaged":
        click.get_current_context().exit(_DAMAGED)


def _texts(options: VerifyCommandOptions) -> Texts:
    from rain_mergekit.evaluation.texts import Texts  # noqa: PLC0415

    markers, optional = given_markers(options.markers), False
    if markers is None:
        markers, optional = _recorded_markers(options.merged)
    return Texts(
        path=options.reasoning_data or "",
        count=options.samples,
        markers=markers,
        window=options.window,
        max_tokens=options.max_tokens,
        chat_template_kwargs=options.chat_template_kwargs,
        optional=optional,
    )


def _recorded_markers(merged: str) -> tuple[Markers | None, bool]:
    """What the merge was told of markers, and whether its samples need blocks, if it is known."""
    from pathlib import Path  # noqa: PLC0415

    from rain_mergekit.config.merge_config import read_config  # noqa: PLC0415

    path = Path(merged, "mergekit_config.yml")
    if not path.is_file():
        return None, False
    try:
        settings = read_config(path).settings
    except RainError:  # of another method, or another version
        return None, False
    return settings.marker_texts, settings.blocks == "optional"


def _made_from(merged: str) -> str:
    """The reasoning model that the merge in this folder names; RainError where there is none."""
    from pathlib import Path  # noqa: PLC0415

    from rain_mergekit.config.merge_config import read_recipe  # noqa: PLC0415

    if not Path(merged, "mergekit_config.yml").is_file():
        raise RainError(
            f"{merged}: is not the folder of a merge: name the reasoning model with --against"
        )
    try:
        return str(read_recipe(merged).reasoning)
    except RainError as error:
        raise RainError(f"{error}; or name the reasoning model with --against") from None


def _check_folder(merged: str) -> None:
    """Refuse a wrong folder before anything that takes time."""
    from pathlib import Path  # noqa: PLC0415

    from rain_mergekit.config.plain_merge import read_any  # noqa: PLC0415

    read_any(Path(merged, "mergekit_config.yml"))


def _write_card(
    merged: str, found: VerificationResult, data: DataSet[Any], console: Console
) -> None:
    from rain_mergekit.evaluation import verification_record  # noqa: PLC0415
    from rain_mergekit.report.model_card import write_card  # noqa: PLC0415

    verification_record.save(merged, found.drift, data.path, data.sha256)
    write_card(merged)
    console.print(f"Wrote it into {merged}/README.md")


def _asked(options: VerifyCommandOptions) -> list[Asked]:
    """The prompts to answer; checked before anything that takes time."""
    count = options.generate or (_PROMPTS if options.reasoning_data is None else None)
    if not count:
        return []
    from rain_mergekit.evaluation.answer_files import chosen_prompts  # noqa: PLC0415

    cache = options.loading.transformers_cache
    return chosen_prompts(options.prompts or options.reasoning_data, count, cache)
