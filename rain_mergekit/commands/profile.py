"""`calibrate --profile`: where the time went, as a trace in a file and as shares on the screen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rain_mergekit.commands.console import Console, duration
from rain_mergekit.system.atomic_file import refuse_foreign
from rain_mergekit.system.profile import LOAD, PHASES, Profile, profiling

_WORDS = {
    "load": "waiting for weights",
    "forward": "forward passes",
    "solve": "solving",
    "write": "writing results",
    "states": "hidden states and targets",
}


@contextmanager
def profiled(path: str | None, device: str, console: Console) -> Iterator[None]:
    """Profile the block and write the trace to `path`; without a path do nothing.

    RainError if there is another file at that place.
    """
    if path is None:
        yield
        return
    ours = path.endswith(".json")
    refuse_foreign(path, "a trace (.json)", "name another file", ours=ours)
    profile = Profile(_synchronize(device))
    with profiling(profile):
        yield
    profile.write(Path(path))
    for line in profile_lines(profile):
        console.print(line)
    console.print(f"Wrote {path}")


def profile_lines(profile: Profile) -> Iterator[str]:
    """Seconds and shares of the whole time, and how fast weights were read."""
    whole, seconds = profile.elapsed, profile.seconds()
    yield f"Where {duration(whole)} went:"
    for name in PHASES:
        spent = seconds.get(name, 0.0)
        yield f"  {_WORDS[name]:<26} {duration(spent):>12}  {spent / whole:>6.1%}"
    rest = whole - sum(seconds.values())
    yield f"  {'the rest':<26} {duration(rest):>12}  {rest / whole:>6.1%}"
    reading = profile.seconds(main=False).get(LOAD, 0.0) or seconds.get(LOAD, 0.0)
    if reading:
        giga = profile.bytes[LOAD] / 1e9
        yield f"  weights: {giga:.2f} GB read in {duration(reading)}, {giga / reading:.2f} GB/s"


def _synchronize(device: str) -> Callable[[], object]:
    """Wait for what the device still has to do; nothing on a CPU."""
    kind = torch.device(device).type
    if kind == "cpu":
        return lambda: None
    backend: Any = getattr(torch, kind)
    wait: Callable[[], object] = backend.synchronize
    return wait
