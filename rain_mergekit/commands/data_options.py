"""The options of `data reasoning` and `data instruction`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from rain_mergekit.commands.options import (
    Loading,
    MarkerPairs,
    Talk,
    device_option,
    dtype_option,
    loading_options,
    markers_option,
    output_options,
    parse_mapping,
    template_option,
)

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class BuildOptions:
    """What the command line of `data reasoning` and `data instruction` says."""

    model: str
    server: str | None
    prompts: str
    output: str
    count: int | None
    attempts: int
    max_new_tokens: int
    temperature: float | None
    top_p: float | None
    seed: int
    markers: MarkerPairs
    chat_template_kwargs: dict[str, Any]
    batch_size: int
    parallel: int
    timeout: float
    retries: int
    api_key_env: str | None
    extra_body: dict[str, Any]
    device: str
    dtype: str | None
    loading: Loading
    talk: Talk


def building_options(default_output: str) -> Callable[[F], F]:
    """All options but the text of the command."""
    count = click.IntRange(min=1)
    options = (
        click.option("--model", required=True, help="A folder or hub name; its name at --server."),
        click.option("--server", metavar="URL", help="Ask this OpenAI-compatible server instead."),
        click.option("--prompts", required=True, type=click.Path(), help="What to ask."),
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
        click.option(
            "--max-new-tokens",
            type=count,
            default=8192,
            show_default=True,
            help="Longer answers are dropped.",
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(min=0),
            help="0: always the likeliest token  [default: the model's own]",
        ),
        click.option(
            "--top-p", type=click.FloatRange(0, 1, min_open=True), help="[default: the model's own]"
        ),
        click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True),
        markers_option,
        template_option,
        click.option(
            "--batch-size",
            type=count,
            default=8,
            show_default=True,
            help="Answers at a time, without --server.",
        ),
        click.option(
            "--parallel",
            type=count,
            default=8,
            show_default=True,
            help="Requests at a time, with --server.",
        ),
        click.option(
            "--timeout",
            type=click.FloatRange(min=0, min_open=True),
            default=600.0,
            show_default=True,
            metavar="SECONDS",
            help="For one request.",
        ),
        click.option(
            "--retries",
            type=click.IntRange(min=0),
            default=4,
            show_default=True,
            help="For a request that fails.",
        ),
        click.option(
            "--api-key-env",
            metavar="NAME",
            help="The environment variable that holds the server's key.",
        ),
        click.option(
            "--extra-body",
            metavar="JSON",
            callback=lambda _context, _option, value: parse_mapping(value),
            default="{}",
            help="Further fields of each request, with --server.",
        ),
        device_option(),
        dtype_option(),
        loading_options,
        output_options,
    )

    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply
