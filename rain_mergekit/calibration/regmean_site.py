"""RegMean at one input site: positions, and the directions that are worth storing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from rain_mergekit.calibration.protected_positions import INSTRUCTION
from rain_mergekit.calibration.samples import Samples
from rain_mergekit.calibration.site_solver import SiteResult, share_of, unconstrained
from rain_mergekit.capture.streams import REASONING, StreamPlan, TokenSamples
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.errors import RainError
from rain_mergekit.linalg.graded import graded
from rain_mergekit.linalg.projection import count_for_share
from rain_mergekit.linalg.row_collector import Group, RowCollector, weighted_rows
from rain_mergekit.system.evenly_spaced import evenly_spaced
from rain_mergekit.system.memory import trim_heap

REASONING_TEXT = "reasoning text"
UNMERGED = "reasoning, not merged"


def plan_texts(samples: Samples, rows: int | None, *, merged: bool = False) -> list[StreamPlan]:
    """Tokens of whole texts of both sets: `rows` of each set, spread evenly; None: every token.

    merged: they pass the merged layers, and the reasoning set once more the reasoning model's.
    """
    members = samples.reasoning.samples
    plans = [_plan(REASONING, REASONING_TEXT, members, rows)]
    if samples.instruction is not None:
        plans.append(_plan(INSTRUCTION, INSTRUCTION, samples.instruction.samples, rows))
    if not merged:
        return plans
    again = StreamPlan(UNMERGED, members, [{}] * len(members))
    return [*(replace(plan, merged=True) for plan in plans), again]


def _plan(name: str, group: str, members: TokenSamples, rows: int | None) -> StreamPlan:
    every = [range(len(one.input_ids)) for one in members]
    if rows is None:
        return StreamPlan(name, members, [{group: places} for places in every])
    each = max(1, rows // len(members))
    return StreamPlan(name, members, [{group: evenly_spaced(places, each)} for places in every])


def solve_regmean(
    name: str,
    width: int,
    collectors: Mapping[str, RowCollector],
    deltas: Iterable[Tensor],
    max_rank: int,
    *,
    settings: RainSettings,
) -> SiteResult:
    """U, V with I - U Vᵀ = G_I (G_I + s G_R)⁻¹ as far as the rank goes.

    The directions are ordered by what they take off the objective; `rank_share` of that is kept,
    or everything with `rank_by: full`. Raises RainError naming the site.
    """
    reasoning = weighted_rows(collectors, [Group(REASONING_TEXT, 1.0)])
    if reasoning is None or settings.regmean.thinking_weight == 0:
        return unconstrained(width)
    instruction = weighted_rows(collectors, [Group(INSTRUCTION, 1.0)])
    trim_heap()
    try:
        weight, epsilon = settings.regmean.thinking_weight, settings.regmean.epsilon
        found = graded(reasoning, instruction, weight, epsilon)
    except RainError as error:
        raise RainError(f"{name}: {error}") from None
    gains = found.gains(deltas)
    order = gains.argsort(descending=True, stable=True)
    full = settings.rank_by == "full"
    wanted = len(order) if full else count_for_share(gains[order], settings.rank_share)
    chosen = order[: min(wanted, max_rank)]
    return SiteResult(
        width=width,
        positions=collectors[REASONING_TEXT].count,
        factors=found.factors(chosen),
        spectrum=found.ratios,
        energies=gains,
        kept_energy=share_of(found.weights, chosen, float(found.weights.sum())),
        kept_response_energy=share_of(gains, chosen, float(gains.sum())),
        capped=len(chosen) < wanted,
    )
