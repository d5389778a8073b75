"""Options and parameter types that several commands share; light, for `--help`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import click

from rain_mergekit.config.type_names import type_name
from rain_mergekit.errors import RainError
from rain_mergekit.system import blas_mode

if TYPE_CHECKING:
    import torch

    from rain_mergekit.commands.console import Console
    from rain_mergekit.models.loading import LoadOptions
    from rain_mergekit.text.markers import Markers


F = TypeVar("F", bound=Callable[..., Any])
Options = TypeVar("Options")
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Loading:
    """How models are found; the values of `loading_options`."""

    trust_remote_code: bool
    lora_merge_cache: str | None
    lora_merge_dtype: str | None
    transformers_cache: str | None

    def options(self) -> LoadOptions:
        """The values for the functions that open models."""
        from rain_mergekit.models.loading import LoadOptions  # noqa: PLC0415 - keeps --help fast

        return LoadOptions(**asdict(self))


@dataclass(frozen=True)
class Talk:
    """How much a command says; the values of `output_options`."""

    quiet: bool
    verbosity: int

    def console(self, *, quiet: bool = False) -> Console:
        """A console that says this much, or nothing with `quiet`."""
        from rain_mergekit.commands.console import Console  # noqa: PLC0415 - keeps --help fast

        return Console(quiet=self.quiet or quiet, verbosity=self.verbosity)


# Fields of these types take the values of their own fields; modules add theirs.
GROUPS: dict[str, type[Any]] = {"Loading": Loading, "Talk": Talk}


def stacked(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    """One decorator for several options, shown in this order."""

    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


def typed(options: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Call the command with one object of this dataclass, made of the values that click gives.

    Its fields are named as click's parameters; a field of type Loading or Talk takes those of its
    own fields. A parameter without a field, or a field without a parameter, is a TypeError.
    """

    def decorate(function: Callable[[Options], None]) -> Callable[..., None]:
        @wraps(function)
        def call(**values: Any) -> None:
            function(options(**_grouped(options, values)))

        return call

    return decorate


def _grouped(options: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    found = dict(values)
    for field in fields(options):
        if (group := GROUPS.get(str(field.type))) is not None:
            found[field.name] = group(**{part.name: found.pop(part.name) for part in fields(group)})
    return found


def parse_size(value: str) -> int:
    """A number of bytes from `2GiB`, `500MB` or `1048576`; a usage error names what is allowed."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", str(value).strip().lower())
    if found is None:
        raise click.BadParameter(f"{value!r} is not a size such as 2GiB, 500MB or 1048576")
    return int(float(found.group(1)) * {**_UNITS, **_BINARY}[found.group(2) or ""])


def parse_mapping(value: str) -> dict[str, Any]:
    """A JSON object; a usage error says what is wrong with the text."""
    try:
        found = json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise click.BadParameter(f'{value!r} is not a JSON object such as {{"name": true}}')
    return found


def markers_option(function: F) -> F:
    """Add `--markers`: pairs of texts around thinking; without any they are found out."""
    return click.option(
        "--markers",
        nargs=2,
        multiple=True,
        metavar="OPEN CLOSE",
        help="What opens and closes thinking; may be given several times  [default: found out]",
    )(function)


def template_option(function: F) -> F:
    """Add `--chat-template-kwargs`, a mapping."""
    return click.option(
        "--chat-template-kwargs",
        callback=lambda _context, _option, value: parse_mapping(value),
        default="{}",
        help="Arguments of the chat template, such as '{\"enable_thinking\": true}'.",
    )(function)


MarkerPairs: TypeAlias = tuple[tuple[str, str], ...]


def given_markers(pairs: MarkerPairs) -> Markers | None:
    """The markers of the command line; None where they are to be found out."""
    from rain_mergekit.text.markers import Markers  # noqa: PLC0415 - keeps --help fast

    return Markers.of(pairs) if pairs else None


def parse_device(value: str) -> str:
    """`cpu`, `cuda`, `cuda:1` or `auto` as it is; a usage error names what is allowed."""
    if not re.fullmatch(r"cpu|auto|(cuda|xpu)(:\d+)?", str(value)):  # mps knows no float64
        raise click.BadParameter(f"{value!r} is not one of cpu, cuda, cuda:N, auto")
    return str(value)


def device_option(name: str = "--device", text: str = "Where to compute.") -> Callable[[F], F]:
    """Add an option for the device; `auto` is the GPU if there is one."""
    return click.option(
        name,
        type=parse_device,
        metavar="cpu|cuda|auto",
        default="auto",
        show_default=True,
        help=text,
    )


class _TypeName(click.Choice):  # type: ignore[type-arg] # generic since click 8.2 only
    """A number type in any of its usual spellings."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The spelling that torch has."""
        return super().convert(type_name(str(value)), param, ctx)


def dtype_option(name: str = "--dtype") -> Callable[[F], F]:
    """Add an option for the type in which the model's layers compute."""
    text = "Type of the forward pass  [default: float32 on the CPU, else the model's own]"
    return click.option(name, type=_TypeName(DTYPES), help=text)


def budget_option(function: F) -> F:
    """Add `--activation-budget`: bytes for hidden states in memory."""
    return click.option(
        "--activation-budget",
        type=parse_size,
        metavar="SIZE",
        default="2GiB",
        show_default=True,
        help="Memory for hidden states; the rest goes to disk.",
    )(function)


def experts_option(function: F) -> F:
    """Add `--experts-budget`: bytes of a layer's routed experts in memory."""
    return click.option(
        "--experts-budget",
        type=parse_size,
        metavar="SIZE",
        help="Read the routed experts of a layer one by one, whenever tokens reach them, where all "
        "of them take more than that in one model; 0: always.  [default: never]",
    )(function)


def deterministic_option(function: F) -> F:
    """Add `--deterministic`; `cli` sets what it needs before torch is loaded."""
    return click.option(
        blas_mode.OPTION,
        is_flag=True,
        help="The same bits whatever the number of threads; slower.",
    )(function)


def threads_option(function: F) -> F:
    """Add `--threads`, the number of torch's threads."""
    return click.option(
        "--threads",
        type=click.IntRange(min=1),
        metavar="N",
        help="Threads to compute with  [default: OMP_NUM_THREADS; else one for a small model, all "
        "cores for others]",
    )(function)


def loading_options(function: F) -> F:
    """Add the options that say how models are found, named as mergekit names them."""
    for option in (
        click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a model."),
        click.option("--lora-merge-cache", metavar="DIR", help="Where to merge adapters."),
        click.option("--lora-merge-dtype", metavar="DTYPE", help="In which type to merge them."),
        click.option("--transformers-cache", metavar="DIR", help="Where downloads are stored."),
    ):
        function = option(function)
    return function


def output_options(function: F) -> F:
    """Add `--quiet` and `-v`."""
    quiet = click.option("--quiet", is_flag=True, help="Print errors and warnings only.")
    verbose = click.option("-v", "verbosity", count=True, help="Log more; -vv logs everything.")
    return quiet(verbose(function))


def pick_device(name: str) -> str:
    """Resolve `auto`; RainError if the device is not there."""
    import torch  # noqa: PLC0415 - keeps --help fast

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return name
    backend: Any = getattr(torch, kind, None)
    if backend is None or not backend.is_available():
        raise RainError(
            f"--device {name}: no GPU: this torch sees no such device; use --device cpu"
        )
    if index and int(index) >= backend.device_count():
        count = backend.device_count()
        raise RainError(f"--device {name}: there are only {count} of them, numbered from 0")
    return name


def pick_dtype(name: str | None) -> torch.dtype | None:
    """The torch type of that name; None stays None."""
    import torch  # noqa: PLC0415 - keeps --help fast

    return None if name is None else getattr(torch, name)
