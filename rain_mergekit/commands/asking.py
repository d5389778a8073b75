"""Options of the commands that let a model answer prompts, here or behind a server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rain_mergekit.commands.options import (
    GROUPS,
    Loading,
    device_option,
    dtype_option,
    parse_mapping,
    pick_device,
    pick_dtype,
    stacked,
)

if TYPE_CHECKING:
    from rain_mergekit.data_building.tasks import Sampling, Writer

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Asking:
    """Where the model answers and how answers are drawn; the values of `asking_options`."""

    server: str | None
    max_new_tokens: int
    temperature: float | None
    top_p: float | None
    seed: int
    batch_size: int
    continuous: bool
    parallel: int
    timeout: float
    retries: int
    api_key_env: str | None
    extra_body: dict[str, Any]
    sampling_of: str | None
    device: str
    dtype: str | None


GROUPS["Asking"] = Asking


def asking_options(longer: str) -> Callable[[F], F]:
    """Add the options for asking a model; longer: the help of --max-new-tokens."""
    count = click.IntRange(min=1)
    options = (
        click.option("--server", metavar="URL", help="Ask this OpenAI-compatible server instead."),
        click.option("--max-new-tokens", type=count, default=8192, show_default=True, help=longer),
        click.option(
            "--temperature",
            type=click.FloatRange(min=0),
            help="0: always the likeliest token  [default: the model's own]",
        ),
        click.option(
            "--top-p", type=click.FloatRange(0, 1, min_open=True), help="[default: the model's own]"
        ),
        click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True),
        click.option(
            "--batch-size",
            type=count,
            default=8,
            show_default=True,
            help="Answers at a time, without --server.",
        ),
        click.option(
            "--continuous",
            is_flag=True,
            help="Without --server: the next prompt takes the place of each finished answer, where "
            "a batch waits for its longest one. Samples then differ from run to run.",
        ),
        *_server_options(),
        device_option(),
        dtype_option(),
    )

    return stacked(*options)


def _server_options() -> tuple[Callable[[Any], Any], ...]:
    return (
        click.option(
            "--parallel",
            type=click.IntRange(min=1),
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
        click.option(
            "--sampling-of",
            metavar="MODEL",
            help="A folder or hub name: tell --server to draw tokens as its generation_config.json "
            "says  [default: the server's own way]",
        ),
    )


def writer_of(
    model: str, asking: Asking, template: dict[str, Any], loading: Loading
) -> tuple[Writer, Sampling]:
    """The model, and how its answers are drawn. template: arguments of the chat template."""
    from rain_mergekit.data_building.tasks import Sampling  # noqa: PLC0415

    sampling = Sampling(
        max_new_tokens=asking.max_new_tokens,
        temperature=asking.temperature,
        top_p=asking.top_p,
        seed=asking.seed,
    )
    if asking.server is not None:
        from rain_mergekit.data_building.server import Address, ServerWriter  # noqa: PLC0415
        from rain_mergekit.models.drawing import recommended  # noqa: PLC0415

        makers, cache = asking.sampling_of, loading.transformers_cache
        address = Address(
            asking.server,
            model,
            asking.timeout,
            asking.parallel,
            asking.retries,
            asking.api_key_env,
            # vLLM, SGLang and llama.cpp know it; OpenAI's own service does not.
            {**({"chat_template_kwargs": template} if template else {}), **asking.extra_body},
            {} if makers is None else recommended(makers, cache),
        )
        return ServerWriter.of(address, sampling), sampling
    from rain_mergekit.data_building.continuous import ContinuousWriter  # noqa: PLC0415
    from rain_mergekit.data_building.local import LocalWriter  # noqa: PLC0415
    from rain_mergekit.models.loading import open_checkpoint  # noqa: PLC0415

    local = (ContinuousWriter if asking.continuous else LocalWriter)(
        open_checkpoint(model, loading.options()),
        sampling,
        device=pick_device(asking.device),
        dtype=pick_dtype(asking.dtype),
        batch_size=asking.batch_size,
        chat_template_kwargs=template,
    )
    return local, sampling
