"""How many threads torch uses: one where more would only wait for each other."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LOG = logging.getLogger(__name__)
_SET_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Below this hidden size the work is short with one thread, and on busy cores threads that wait for
# each other take several times as long as one (docs/performance.md).
LARGE = 1024


def wait_passively() -> None:
    """Let waiting threads sleep instead of spin, unless the user chose otherwise.

    The OpenMP of torch reads it when it is loaded: afterwards nothing is set.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@contextmanager
def threads_for(hidden_size: int, wanted: int | None = None) -> Iterator[None]:
    """Inside the block torch has `wanted` threads; None: one for small models, else unchanged.

    The number that the user gave in the environment is not changed.
    """
    import torch  # noqa: PLC0415 - a variable may have to be set before it is loaded

    before = torch.get_num_threads()
    given = next((name for name in _SET_BY_USER if os.environ.get(name)), None)
    if wanted is None and given is None and hidden_size < LARGE and before > 1:
        LOG.info("one thread: models of hidden size %d need no more", hidden_size)
        wanted = 1
    if wanted is None:
        number = "one thread" if before == 1 else f"{before} threads"
        LOG.info("%s%s", number, f", as {given} says" if given else "")
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
