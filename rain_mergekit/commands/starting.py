"""A line on the terminal while libraries are imported, which takes seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

from rain_mergekit.system.beside import beside

PATIENCE = 1.5  # seconds in which nothing needs to be said
_STEP = 0.5
_ERASE = "\r\x1b[K"


@contextmanager
def starting(context: click.Context, *, quiet: bool) -> Iterator[None]:
    """Say that the command is starting, and for how long, until it says something itself.

    Only on a terminal. `end_notice` takes the line away before the end.
    """
    if quiet or not sys.stderr.isatty():
        yield
        return
    with beside(_paint) as end:
        context.meta[__name__] = end
        yield


def end_notice() -> None:
    """End the notice of the command that runs, if there is one; a second time does nothing."""
    context = click.get_current_context(silent=True)
    if context and (end := context.meta.get(__name__)):
        end()


def _paint(done: threading.Event) -> None:
    begun = time.monotonic()
    if done.wait(PATIENCE):
        return
    while True:
        seconds = time.monotonic() - begun
        sys.stderr.write(f"\r  starting: torch, transformers, mergekit, {seconds:.0f} s")
        sys.stderr.flush()
        if done.wait(_STEP):
            break
    sys.stderr.write(_ERASE)
    sys.stderr.flush()
