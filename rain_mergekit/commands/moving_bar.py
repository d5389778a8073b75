"""A progress bar whose elapsed time is updated between steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from rain_mergekit.commands.console import Console
from rain_mergekit.system.repainting import repainted

_FORMAT = "  {desc}{percentage:3.0f}%|{bar}| {elapsed}"


@contextmanager
def moving_bar(total: float, what: str, console: Console) -> Iterator[tqdm[Any]]:
    """A bar of this many steps, redrawn twice a second; nothing if output is not a terminal."""
    quiet = not console.progress
    with (
        tqdm(total=total, desc=what, bar_format=_FORMAT, leave=False, disable=quiet) as bar,
        repainted(bar),
    ):
        yield bar
