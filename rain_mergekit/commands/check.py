"""`mergekit-rain check`: check a configuration before anything is computed."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import click

from rain_mergekit.commands.json_output import json_option, print_json
from rain_mergekit.commands.options import Loading, Talk, loading_options, output_options, typed
from rain_mergekit.system.wording import counted

_PROBLEM = 3
_MARKS = {"problem": "PROBLEM", "warning": "warning", "note": ""}


@dataclass(frozen=True)
class CheckOptions:
    """What the command line says."""

    config: str
    as_json: bool
    loading: Loading
    talk: Talk


@click.command(epilog="\b\nExample:\n  mergekit-rain check config.yml")
@click.argument("config", type=click.Path())
@json_option
@loading_options
@output_options
@typed(CheckOptions)
def check(options: CheckOptions) -> None:
    """Say what the merge of CONFIG will meet: shapes, vocabularies, types, templates, roles.

    Also how the models are related, the size and sign of their task vectors, the rank and size of
    the calibration file, and what mergekit leaves out. Headers, tokenizers, the samples and a few
    rows of the weights are read; no model is run. Exit code 3 if something would stop the merge.
    """
    from rain_mergekit.config.merge_config import read_config  # noqa: PLC0415 - keeps --help fast
    from rain_mergekit.evaluation.config_check import check_config  # noqa: PLC0415

    console = options.talk.console(quiet=options.as_json)
    console.setup()
    found = check_config(read_config(options.config), options.loading.options())
    problems = sum(one.level == "problem" for one in found)
    warnings = sum(one.level == "warning" for one in found)
    verdict = f"{counted(problems, 'problem')}, {counted(warnings, 'warning')}"
    if options.as_json:
        findings = [asdict(one) for one in found]
        print_json("check", {"config": options.config, "verdict": verdict, "findings": findings})
    topic = ""
    for one in found:
        if one.topic != topic:
            console.heading(one.topic)
        topic = one.topic
        console.print("  " + " ".join(filter(None, (_MARKS[one.level], one.text))))
    console.heading(f"Verdict: {verdict}")
    if problems:
        click.get_current_context().exit(_PROBLEM)
