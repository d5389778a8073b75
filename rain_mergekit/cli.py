"""`mergekit-rain`: the command group. Commands are imported when called, so help is instant."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import warnings
from types import FrameType
from typing import Any

import click
from click.shell_completion import CompletionItem

from rain_mergekit import __version__
from rain_mergekit.commands.starting import starting
from rain_mergekit.errors import RainError
from rain_mergekit.system import blas_mode, threads
from rain_mergekit.system.memory import CALIBRATION, MERGE, OutOfMemory, out_of_memory, shortage
from rain_mergekit.system.terminal_safe import clean_lines
from rain_mergekit.system.wording import did_you_mean

# Name -> (module:object, one line of help); the modules are heavy.
_COMMANDS = {
    "auto": ("rain_mergekit.auto.command:auto", "From two or three names to a measured merge."),
    "check": ("rain_mergekit.commands.check:check", "Say what a configuration will meet."),
    "estimate": (
        "rain_mergekit.commands.estimate:estimate",
        "What a calibration would need, from a config.json.",
    ),
    "dequantize": (
        "rain_mergekit.commands.dequantize:dequantize",
        "Write a quantised model's weights in bfloat16.",
    ),
    "calibrate": ("rain_mergekit.commands.calibrate:calibrate", "Write the calibration file."),
    "merge": ("rain_mergekit.commands.merge:merge", "Calibrate if needed, then merge."),
    "finish": ("rain_mergekit.commands.finish:finish", "Put right what mergekit-yaml wrote."),
    "verify": ("rain_mergekit.commands.verify:verify", "Measure what a merge did to thinking."),
    "ask": ("rain_mergekit.commands.ask:ask", "Let a model answer prompts, and keep the answers."),
    "compare": ("rain_mergekit.commands.compare:compare", "What a merge won and lost in answers."),
    "diff": ("rain_mergekit.commands.diff:diff", "Show which tensors of two models differ."),
    "sweep": ("rain_mergekit.commands.sweep:sweep", "Merge at several strengths and compare."),
    "inspect": ("rain_mergekit.commands.inspect:inspect", "Show what a calibration file holds."),
    "report": ("rain_mergekit.commands.report:report", "Draw what it holds, as one HTML page."),
    "push": ("rain_mergekit.commands.push:push", "Put a merged model on the hub."),
    "reproduce": (
        "rain_mergekit.commands.reproduce:reproduce",
        "Make a published merge again and compare.",
    ),
    "card": ("rain_mergekit.commands.card:card", "Say in a model's README.md how it was merged."),
    "data": ("rain_mergekit.commands.data:data", "Build calibration sets, or check one."),
    "convert-alpha": (
        "rain_mergekit.commands.convert_alpha:convert_alpha",
        "Take over coefficients of the published scripts.",
    ),
    "export-lora": (
        "rain_mergekit.commands.export_lora:export_lora",
        "Write a calibration with fit: streams as a LoRA adapter.",
    ),
    "demo": ("rain_mergekit.demo.command:demo", "Show it on a small trained trio, offline."),
    "examples": ("rain_mergekit.commands.examples:examples", "Copy the example files."),
}
_QUIET = {"-q", "--quiet"}
_INTERRUPTED = 130
_EXIT_CODES = {int(signal.SIGINT): _INTERRUPTED, int(signal.SIGTERM): 143}
_received: list[int] = []
_HELP = """\
RAIN-Merging for mergekit: a reasoning model learns to follow instructions and keeps its thinking.

One YAML file drives both steps:

\b
  mergekit-rain calibrate config.yml      writes the file that the YAML names
  mergekit-yaml config.yml ./merged       stock mergekit does the merge

Or both in one, or a first look without any download:

\b
  mergekit-rain merge config.yml ./merged
  mergekit-rain demo ./rain-demo
"""


class RainGroup(click.Group):
    """Loads commands on demand; turns RainError and Ctrl-C into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's interface
        """The names of the commands, in the order in which a user needs them."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the module of one command."""
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Set what must be in the environment before a command imports torch."""
        threads.wait_passively()
        if blas_mode.OPTION in args:
            blas_mode.ask()
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            meant = did_you_mean(args[0], _COMMANDS) or f"; there are {', '.join(_COMMANDS)}"
            ctx.fail(f"No such command {args[0]!r}{meant}")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The commands with their line of help, not imported: completion must be fast."""
        found = [
            CompletionItem(name, help=text)
            for name, (_, text) in _COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a user's mistake ends as `Error: ...` and exit code 1."""
        try:
            with starting(ctx, quiet=bool(_QUIET.intersection(ctx.args))):
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            detail = f": {error}" if str(error) else ""
            click.echo(clean_lines(f"Interrupted{detail}"), err=True)
            ctx.exit(_INTERRUPTED)
        except Exception as error:
            if _received:  # compiled code may turn the interruption into an error of its own
                click.echo("Interrupted", err=True)
                ctx.exit(_EXIT_CODES[_received[0]])
            if out_of_memory(error) and not isinstance(error, OutOfMemory):
                remedy = MERGE if ctx.invoked_subcommand == "merge" else CALIBRATION
                text = shortage(error, f"in {ctx.invoked_subcommand}", remedy)
                raise click.ClickException(clean_lines(text)) from None
            if isinstance(error, RainError):
                raise click.ClickException(clean_lines(str(error))) from None
            raise


@click.group(
    cls=RainGroup,
    help=_HELP,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done; 1 an input cannot be used (one line says why); 2 wrong usage; "
    "3 the thinking was found damaged, compare that a bound is broken, or check that the merge "
    "would stop; 4 reproduce found other tensors; 130 interrupted, 143 terminated.",
)
@click.version_option(__version__, "--version", prog_name="mergekit-rain")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """The command group; its help text is `_HELP`."""
    if os.environ.get("NO_COLOR"):
        ctx.color = False


def main() -> None:
    """Run the command line; leave by an exit code."""
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    if not sys.warnoptions:  # what libraries announce for their next releases is for developers
        warnings.simplefilter("ignore", FutureWarning)
    cli(prog_name="mergekit-rain")


def _stop(number: int, _frame: FrameType | None) -> None:
    """Raise an exception, so that temporary files are removed."""
    _received.append(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(_EXIT_CODES[number])


if __name__ == "__main__":
    main()
