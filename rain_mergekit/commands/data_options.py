"""The options of `data reasoning` and `data instruction`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from rain_mergekit.commands.asking import Asking, asking_options
from rain_mergekit.commands.json_output import json_option
from rain_mergekit.commands.options import (
    Loading,
    MarkerPairs,
    Talk,
    loading_options,
    markers_option,
    output_options,
    stacked,
    template_option,
)

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class BuildOptions:
    """What the command line of `data reasoning` and `data instruction` says."""

    model: str
    prompts: tuple[str, ...]
    output: str
    count: int | None
    attempts: int
    markers: MarkerPairs
    chat_template_kwargs: dict[str, Any]
    asking: Asking
    loading: Loading
    talk: Talk
    as_json: bool = False


def building_options(default_output: str, prompts: Callable[[F], F]) -> Callable[[F], F]:
    """All options but the text of the command; `prompts`: that option, as each command has it."""
    count = click.IntRange(min=1)
    options = (
        click.option("--model", required=True, help="A folder or hub name; its name at --server."),
        prompts,
        click.option(
            "-o", "--output", type=click.Path(), default=default_output, show_default=True
        ),
        click.option("--count", type=count, help="Samples to choose  [default: all]"),
        click.option(
            "--attempts",
            type=count,
            default=1,
            show_default=True,
            help="Answers to a prompt until one is kept.",
        ),
        asking_options("Longer answers are dropped."),
        markers_option,
        template_option,
        json_option,
        loading_options,
        output_options,
    )

    return stacked(*options)
