"""A line on the terminal while libraries are imported, which takes seconds."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

import click

PATIENCE = 1.5  # seconds in which nothing needs to be said
_STEP = 0.5
_ERASE = "\r\x1b[K"


class StartingNotice:
    """Says that the command is starting, and for how long, until the command says something itself.

    Only on a terminal. A context manager; `end_notice` ends it earlier.
    """

    def __init__(self, context: click.Context, *, quiet: bool) -> None:
        self._context = context
        self._shown = not quiet and sys.stderr.isatty()
        self._done = threading.Event()
        self._painter = threading.Thread(target=self._paint, daemon=True)

    def __enter__(self) -> None:
        if self._shown:
            self._context.meta[__name__] = self
            self._painter.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        """Take the line away; a second time this does nothing."""
        if self._shown and not self._done.is_set():
            self._done.set()
            self._painter.join()

    def _paint(self) -> None:
        begun = time.monotonic()
        if self._done.wait(PATIENCE):
            return
        while True:
            seconds = time.monotonic() - begun
            sys.stderr.write(f"\r  starting: torch, transformers, mergekit, {seconds:.0f} s")
            sys.stderr.flush()
            if self._done.wait(_STEP):
                break
        sys.stderr.write(_ERASE)
        sys.stderr.flush()


def end_notice() -> None:
    """End the notice of the command that runs, if there is one."""
    context = click.get_current_context(silent=True)
    notice = context.meta.get(__name__) if context else None
    if isinstance(notice, StartingNotice):
        notice.end()
