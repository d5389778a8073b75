"""What `mergekit-rain auto` has to do: the request, the place of its result, how it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mergekit.options import MergeOptions

from rain_mergekit.auto.request import Request
from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.commands.options import Loading, Talk


@dataclass(frozen=True)
class Job:
    """A request, where its result goes, and how it is computed. command: what was typed."""

    request: Request
    out: Path
    run: RunOptions
    loading: Loading
    talk: Talk
    merge_options: MergeOptions
    command: str
