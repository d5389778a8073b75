"""From the features and task vectors of one input site to its rank, factors and report numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rain_mergekit.config.settings import RainSettings
from rain_mergekit.errors import RainError
from rain_mergekit.linalg import projection
from rain_mergekit.linalg.factors import Factors
from rain_mergekit.linalg.feature_rows import FeatureRows
from rain_mergekit.system.memory import trim_heap


@dataclass(frozen=True)
class SiteResult:
    """What the calibration file records of one site (width d, rank r).

    channels: for AIM instead of all that, the mean absolute value of each channel (d).
    """

    width: int
    positions: int
    factors: Factors
    spectrum: Tensor
    energies: Tensor
    kept_energy: float
    kept_response_energy: float
    capped: bool
    channels: Tensor | None = None

    @property
    def rank(self) -> int:
        """Number of protected directions."""
        return self.factors.rank

    def to(self, device: torch.device) -> SiteResult:
        """A copy with its tensors on that device."""
        return replace(
            self,
            factors=self.factors.to(device),
            spectrum=self.spectrum.to(device),
            energies=self.energies.to(device),
            channels=None if self.channels is None else self.channels.to(device),
        )


@dataclass(frozen=True)
class SiteFeatures:
    """What reaches one site.

    Attributes:
        protected: weighted features (n, d) that the merge leaves as they are.
        positions: how many tokens they are of.
        instruction: features of the instruction set's responses (m, d); None for an orthogonal
            projection.
        attention_inputs: features (k, d) of which only the share `reading_share` of the response
            is protected.
    """

    protected: Tensor | FeatureRows
    positions: int
    instruction: Tensor | FeatureRows | None = None
    attention_inputs: Sequence[Tensor | FeatureRows] = ()


def solve_site(
    name: str,
    features: SiteFeatures,
    task_vectors: Iterable[Tensor],
    settings: RainSettings,
    max_rank: int,
) -> SiteResult:
    """Choose the rank and compute U and V of one site.

    Args:
        name: of the site, for messages.
        features: what reaches it.
        task_vectors: Δ (d_out, d) of the modules that share the site, or blocks of their rows;
            gone through once, and once more for each of `attention_inputs`.
        settings: how the rank is chosen, and which projection.
        max_rank: the largest number of directions.

    Raises:
        RainError: the basis would fill the whole space; the message names the site.
    """
    try:
        found = projection.spectrum(features.protected)
        trim_heap()
        others = [FeatureRows.of(more).near_unit() for more in features.attention_inputs]
        answers = projection.response_energies([found, *others], task_vectors)
        energies = answers[0] * found.total
        trim_heap()
        order, wanted = _select(found.values, energies, settings)
        rank = min(wanted, max_rank)
        chosen = order[:rank]
        if rank >= found.width:
            raise RainError(_full_space(found.width))
        basis = found.directions(chosen)
        room, capped = min(max_rank, found.width - 1), rank < wanted
        for more, answer in zip(others, answers[1:], strict=True):
            total, share = float(answer.sum()), settings.reading_share
            basis, cut = projection.extend_basis(basis, more, total, task_vectors, share, room)
            capped |= cut
            trim_heap()
        factors = _factors(basis, features.instruction, settings)
    except RainError as error:
        raise RainError(f"{name}: {error}") from None
    if settings.ridge > 0:
        weights = projection.ridge_weights(found.values[chosen], settings.ridge)
        whole = weights.new_ones(basis.shape[1] - rank)
        factors = projection.soften(factors, torch.cat([weights, whole]))
    return SiteResult(
        width=found.width,
        positions=features.positions,
        factors=factors,
        spectrum=found.values,
        energies=energies,
        kept_energy=share_of(found.values, chosen, found.total),
        kept_response_energy=share_of(energies, chosen, float(energies.sum())),
        capped=capped,
    )


def unconstrained(width: int) -> SiteResult:
    """The site of an expert to which no protected token was routed: nothing is projected."""
    none = torch.zeros(width, 0, dtype=torch.float64)
    empty = torch.zeros(0, dtype=torch.float64)
    return SiteResult(width, 0, Factors(none, none), empty, empty, 1.0, 1.0, capped=False)


def _select(values: Tensor, energies: Tensor, settings: RainSettings) -> tuple[Tensor, int]:
    """The order in which directions are protected, and how many the rule asks for."""
    by_value = torch.arange(values.numel(), device=values.device)
    if settings.rank_by == "response_energy":
        order = energies.argsort(descending=True, stable=True)
        return order, projection.count_for_share(energies[order], settings.rank_share)
    if settings.rank_by == "energy":
        return by_value, projection.count_for_share(values, settings.rank_share)
    if settings.rank_by == "tolerance":
        return by_value, projection.count_above(values, settings.rank_tolerance)
    if settings.rank_by == "count":
        return by_value, min(settings.rank_count or 0, values.numel())
    return by_value, values.numel()


def _factors(
    basis: Tensor, instruction_rows: Tensor | FeatureRows | None, settings: RainSettings
) -> Factors:
    if settings.projection == "oblique" and instruction_rows is not None:
        return projection.oblique_factors(basis, instruction_rows, settings.epsilon)
    return projection.orthogonal_factors(basis)


def share_of(energies: Tensor, chosen: Tensor, total: float) -> float:
    """What the chosen ones have of `total`; 1 where that is zero."""
    return float(energies[chosen].sum()) / total if total > 0 else 1.0


def _full_space(width: int) -> str:
    return (
        f"the protected basis fills all {width} directions, so nothing would be merged; "
        "use rank_by: response_energy or energy, a smaller rank_share, or max_rank"
    )
