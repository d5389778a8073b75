"""A thread that works beside what a `with` block does, until it is told to end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def beside(work: Callable[[threading.Event], None]) -> Iterator[Callable[[], None]]:
    """Run `work` in a thread of its own; its event is set at the end of the block.

    Yields a function that ends it earlier and waits for that; called again it does nothing.
    """
    done = threading.Event()
    thread = threading.Thread(target=work, args=(done,), daemon=True)

    def end() -> None:
        done.set()
        thread.join()

    thread.start()
    try:
        yield end
    finally:
        end()
