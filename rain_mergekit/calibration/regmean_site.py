"""RegMean at one input site: positions, and the directions that are worth storing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from rain_mergekit.calibration.protected_positions import INSTRUCTION
from rain_mergekit.calibration.samples import Samples
from rain_mergekit.calibration.site_solver import SiteResult, unconstrained
from rain_mergekit.capture.streams import REASONING, StreamPlan, TokenSamples
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.errors import RainError
from rain_mergekit.linalg.graded import graded
from rain_mergekit.linalg.projection import count_for_share
from rain_mergekit.linalg.row_collector import Group, RowCollector, weighted_rows
from rain_mergekit.system.evenly_spaced import evenly_spaced
from rain_mergekit.system.memory import trim_heap

REASONING_TEXT = "reasoning text"


def plan_texts(samples: Samples, settings: RainSettings) -> list[StreamPlan]:
    """Tokens of whole texts of both sets, spread evenly, within the row limit."""
    plans = [_plan(REASONING, REASONING_TEXT, samples.reasoning.samples, settings)]
    if samples.instruction is not None:
        plans.append(_plan(INSTRUCTION, INSTRUCTION, samples.instruction.samples, settings))
    return plans


def _plan(name: str, group: str, members: TokenSamples, settings: RainSettings) -> StreamPlan:
    rows = max(1, settings.regmean.rows // len(members))
    positions = [{group: evenly_spaced(range(len(one.input_ids)), rows)} for one in members]
    return StreamPlan(name, members, positions)


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
    total = float(gains.sum())
    return SiteResult(
        width=width,
        positions=collectors[REASONING_TEXT].count,
        factors=found.factors(chosen),
        spectrum=found.ratios,
        energies=gains,
        kept_energy=_share(found.weights, chosen),
        kept_response_energy=float(gains[chosen].sum()) / total if total > 0 else 1.0,
        capped=len(chosen) < wanted,
    )


def _share(weights: Tensor, chosen: Tensor) -> float:
    total = float(weights.sum())
    return float(torch.sum(weights[chosen])) / total if total > 0 else 1.0
