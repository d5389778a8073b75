"""Output of the commands: results to stdout, warnings to stderr, no colours in a pipe."""

from __future__ import annotations

import logging
import shutil
import sys
import textwrap
from typing import TextIO

import click

from rain_mergekit.commands.starting import end_notice
from rain_mergekit.system.terminal_safe import clean_lines

KIB = 1024


class Console:
    """Printing with one switch; nothing else in the package prints."""

    def __init__(self, *, quiet: bool = False, verbosity: int = 0) -> None:
        self.quiet = quiet
        self.verbosity = verbosity
        self._warned: set[str] = set()

    @property
    def progress(self) -> bool:
        """Whether to show progress bars: only on a terminal. A notice makes room for them."""
        end_notice()
        return self._watched

    @property
    def _watched(self) -> bool:
        return not self.quiet and sys.stderr.isatty()

    def print(self, text: str = "") -> None:
        """Print a line of the result, with control characters written out."""
        self.print_styled(clean_lines(text))

    def heading(self, text: str) -> None:
        """Print a heading."""
        self.print_styled(click.style(clean_lines(text), bold=True))

    def print_styled(self, text: str) -> None:
        """Print a line with colours; the caller has escaped everything else."""
        end_notice()
        if not self.quiet:
            click.echo(fitted(text, _width(sys.stdout)))

    def warn(self, text: str) -> None:
        """Print a warning; each one only once."""
        if text not in self._warned:
            end_notice()
            self._warned.add(text)
            line = click.style("Warning:", fg="yellow") + f" {clean_lines(text)}"
            click.echo(fitted(line, _width(sys.stderr)), err=True)

    def setup(self, *, logs: bool = True) -> None:
        """Set up logging, unless mergekit does; silence other libraries; imports transformers."""
        from transformers.utils import logging as chatter  # noqa: PLC0415 - heavy

        if logs:
            level = {0: logging.WARNING, 1: logging.INFO}.get(self.verbosity, logging.DEBUG)
            for name in ("rain_mergekit", "mergekit"):
                _log_to_terminal(logging.getLogger(name), level)
        if not self._watched:
            chatter.disable_progress_bar()  # type: ignore[no-untyped-call]
        if not self.verbosity:
            chatter.set_verbosity_error()  # type: ignore[no-untyped-call]


class _Terminal(logging.Handler):
    """Log records as lines on stderr, whatever stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        end_notice()
        click.echo(f"{record.levelname}: {clean_lines(record.getMessage())}", err=True)


def shows_blocks() -> bool:
    """Whether the output is a terminal whose encoding has the block characters."""
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    return sys.stdout.isatty() and encoding.startswith("utf")


def _log_to_terminal(logger: logging.Logger, level: int) -> None:
    logger.setLevel(level)
    if not any(isinstance(handler, _Terminal) for handler in logger.handlers):
        logger.addHandler(_Terminal())


def _width(stream: TextIO) -> int | None:
    """Columns of the terminal that shows the stream; None where nobody reads it on one."""
    if not stream.isatty():
        return None
    return shutil.get_terminal_size().columns or None


def fitted(text: str, width: int | None) -> str:
    """Long lines of prose broken at spaces, the rest of each further in; None: as they are.

    A line with a command stays whole, to be copied, and so does one without a place to break it.
    """
    if width is None:
        return text
    return "\n".join(
        line if len(click.unstyle(line)) <= width or "mergekit-" in line else _broken(line, width)
        for line in text.split("\n")
    )


def _broken(line: str, width: int) -> str:
    inset = " " * (len(line) - len(line.lstrip()))
    return textwrap.fill(
        line,
        width,
        subsequent_indent=f"{inset}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def size(count: int) -> str:
    """Bytes for people: `1.2 MiB`."""
    value, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= KIB and len(units) > 1:
        value, units = value / KIB, units[1:]
    return f"{count} bytes" if units[0] == "bytes" else f"{value:.1f} {units[0]}"


def duration(seconds: float) -> str:
    """Seconds for people: `4.2 s`, `3 min 5 s`, `2 h 10 min`."""
    whole = round(seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
