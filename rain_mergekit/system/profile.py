"""Where the time of a run goes: named phases that do not overlap, and a trace of them.

A phase inside another one pauses it, so the seconds of all phases of a thread add up to the time
that it spent in phases. Outside of `profiling` a phase costs a dictionary look-up.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from rain_mergekit.system.atomic_file import replacing
from rain_mergekit.system.context_value import holding

LOAD, FORWARD, SOLVE, WRITE, STATES = PHASES = "load", "forward", "solve", "write", "states"
_MICRO, _SHOWN = 1e6, 1e-3


class Profile:
    """Mutable: the phases of a run, by thread.

    synchronize: called at both ends of a phase, so that work which a device still has to do counts
    where it was asked for. bytes: what the phases say that they moved.
    """

    def __init__(self, synchronize: Callable[[], object] = lambda: None) -> None:
        self._synchronize = synchronize
        self._start = time.perf_counter()
        self._lock = threading.Lock()
        self._main = threading.get_ident()
        self._open: dict[int, list[tuple[str, float]]] = defaultdict(list)
        self._events: list[tuple[int, str, float, float]] = []
        self._totals: dict[tuple[bool, str], float] = defaultdict(float)
        self.bytes: dict[str, int] = defaultdict(int)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the calling thread."""
        thread = threading.get_ident()
        opened = self._open[thread]
        self._switch(thread, opened)
        opened.append((name, time.perf_counter()))
        try:
            yield
        finally:
            self._switch(thread, opened)
            opened.pop()
            if opened:  # the outer phase goes on
                opened[-1] = (opened[-1][0], time.perf_counter())

    def _switch(self, thread: int, opened: list[tuple[str, float]]) -> None:
        """The innermost phase ends or pauses now."""
        if thread == self._main:
            self._synchronize()
        if not opened:
            return
        (name, since), now = opened[-1], time.perf_counter()
        with self._lock:
            self._totals[thread == self._main, name] += now - since
            if now - since >= _SHOWN:
                self._events.append((thread, name, since, now))

    def moved(self, name: str, count: int) -> None:
        """Count bytes that were read or written in phases of this name."""
        with self._lock:
            self.bytes[name] += count

    def seconds(self, *, main: bool = True) -> dict[str, float]:
        """Seconds by phase of the thread that made this profile, or of all others together."""
        return {name: total for (own, name), total in self._totals.items() if own == main}

    @property
    def elapsed(self) -> float:
        """Seconds since it was made."""
        return time.perf_counter() - self._start

    def write(self, path: Path) -> None:
        """A trace in the Chrome format, for chrome://tracing or ui.perfetto.dev.

        Phases of less than a millisecond count in the sums and are not drawn.
        """
        numbers = {self._main: 0}
        events = [
            {
                "name": name,
                "ph": "X",
                "pid": 0,
                "tid": numbers.setdefault(thread, len(numbers)),
                "ts": (start - self._start) * _MICRO,
                "dur": (end - start) * _MICRO,
            }
            for thread, name, start, end in self._events
        ]
        names: list[dict[str, Any]] = [
            {
                "name": "thread_name",
                "ph": "M",
                "pid": 0,
                "tid": number,
                "args": {"name": "reader" if number else "main"},
            }
            for number in numbers.values()
        ]
        summary = {"seconds": self.seconds(), "reader": self.seconds(main=False)}
        content = {"traceEvents": [*names, *events], "otherData": {**summary, "bytes": self.bytes}}
        with replacing(path) as out:
            out.write(json.dumps(content).encode())


_PROFILE: ContextVar[Profile | None] = ContextVar("rain_profile", default=None)


@contextmanager
def profiling(profile: Profile | None) -> Iterator[None]:
    """Inside the block, phases of this thread go to `profile`."""
    with holding(_PROFILE, profile):
        yield


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A phase of the run that is being profiled, if one is."""
    profile = _PROFILE.get()
    if profile is None:
        yield
        return
    with profile.phase(name):
        yield


def moved(name: str, count: int) -> None:
    """Count bytes that were read or written in phases of this name."""
    profile = _PROFILE.get()
    if profile is not None:
        profile.moved(name, count)
