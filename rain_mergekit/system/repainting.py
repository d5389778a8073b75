"""A progress bar whose elapsed time moves between steps, however long these take."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from tqdm import tqdm

from rain_mergekit.system.beside import beside

SECONDS = 0.5


@contextmanager
def repainted(bar: tqdm[Any]) -> Iterator[None]:
    """Redraw the bar every `SECONDS` seconds inside; a disabled one is left alone."""
    if bar.disable:
        yield
        return
    with beside(partial(_paint, bar)):
        yield


def _paint(bar: tqdm[Any], done: threading.Event) -> None:
    while not done.wait(SECONDS):
        bar.refresh()
