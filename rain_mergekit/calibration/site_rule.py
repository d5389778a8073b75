"""What a merge method asks of the input sites: which positions it looks at, and how it solves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from torch import Tensor

from rain_mergekit.calibration.aim_site import measure_channels
from rain_mergekit.calibration.protected_positions import (
    INSTRUCTION,
    READ,
    plan_streams,
    protected_groups,
)
from rain_mergekit.calibration.regmean_site import REASONING_TEXT, plan_texts, solve_regmean
from rain_mergekit.calibration.samples import Samples
from rain_mergekit.calibration.site_solver import (
    SiteFeatures,
    SiteResult,
    solve_site,
    unconstrained,
)
from rain_mergekit.capture.input_sites import Leave
from rain_mergekit.capture.left_alone import left_alone, nothing
from rain_mergekit.capture.streams import StreamPlan
from rain_mergekit.config.method_names import AIM, REGMEAN
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.linalg.row_collector import ChannelSums, Group, RowCollector, weighted_rows
from rain_mergekit.system.memory import trim_heap

# name, width, the rows by group, the task vectors of the site's weights, the rank's upper bound
SolveSite: TypeAlias = (
    "Callable[[str, int, Mapping[str, RowCollector], Iterable[Tensor], int], SiteResult]"
)


@dataclass(frozen=True)
class SiteRule:
    """plan: which positions of which samples; groups: the names of all groups of rows, in order.

    collector: what gathers the rows of a group. leave: which linear maps have no site.
    """

    plan: Callable[[Samples], list[StreamPlan]]
    groups: tuple[str, ...]
    solve: SolveSite
    collector: type[RowCollector] = RowCollector
    leave: Leave = nothing


def rule_of(method: str, settings: RainSettings) -> SiteRule:
    """The rule of a calibrated merge method."""
    texts = (REASONING_TEXT, INSTRUCTION)
    if method == REGMEAN:
        merged = settings.regmean.features == "merged"
        some = partial(plan_texts, rows=settings.regmean.rows, merged=merged)
        return SiteRule(some, texts, partial(solve_regmean, settings=settings))
    if method == AIM:
        return SiteRule(partial(plan_texts, rows=None), texts, measure_channels, ChannelSums)
    groups = (*(group.name for group in protected_groups(settings)), *READ, INSTRUCTION)
    plan = partial(plan_streams, settings=settings)
    return SiteRule(plan, groups, partial(_solve_rain, settings=settings), leave=left_alone)


def _solve_rain(
    name: str,
    width: int,
    collectors: Mapping[str, RowCollector],
    deltas: Iterable[Tensor],
    max_rank: int,
    *,
    settings: RainSettings,
) -> SiteResult:
    rows = weighted_rows(collectors, protected_groups(settings))
    if rows is None:  # experts to which no protected token was routed
        return unconstrained(width)
    instruction = weighted_rows(collectors, [Group(INSTRUCTION, 1.0)])
    read = [weighted_rows(collectors, [Group(group, 1.0)]) for group in READ]
    count = sum(c.count for group, c in collectors.items() if group not in (*READ, INSTRUCTION))
    trim_heap()
    attended = [rows for rows in read if rows is not None]
    features = SiteFeatures(rows, count, instruction, attended)
    return solve_site(name, features, deltas, settings, max_rank)
