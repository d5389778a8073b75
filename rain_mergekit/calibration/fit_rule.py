"""How the sites of a layer are fitted, and the sums for it within the given memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rain_mergekit.calibration.token_teachers import TaughtText
from rain_mergekit.linalg.ridge_fit import RidgeRows, RidgeSums
from rain_mergekit.system.distributed import World

# Bytes a number of a site's square matrix: the sums, its factor, one to work in; float64.
_MATRICES = 3 * 8


@dataclass(frozen=True)
class FitRule:
    """How each site of a layer is fitted.

    Attributes:
        epsilon: the ridge penalty ε.
        share: of the fitted energy that the low-rank change of a weight keeps.
        max_rank: upper bound of its rank.
        token_weight: weight of one token, by group.
        budget: bytes that the sums of one site may take.
    """

    epsilon: float
    share: float
    max_rank: int
    token_weight: Mapping[str, float]
    budget: int


def empty_sums(
    width: int,
    outputs: Mapping[str, int],
    texts: Sequence[TaughtText],
    rule: FitRule,
    world: World,
) -> tuple[RidgeSums | RidgeRows, int]:
    """Sums (d, d), or single rows if the sums exceed the budget; and the step between used tokens.

    width: d, the inputs of the site. outputs: d_out by the weights' names. Several processes add
    up sums only.
    """
    if _MATRICES * width**2 <= rule.budget or world.size > 1:
        return RidgeSums(width, outputs, world.device), 1
    tokens = sum(len(text.groups) for text in texts if not text.held_out)
    row = sum(outputs.values()) + width
    # _MATRICES n² + 4 row n = budget
    room = 2 * row / _MATRICES
    most = int((room**2 + rule.budget / _MATRICES) ** 0.5 - room)
    return RidgeRows(outputs), max(1, -(-tokens // max(1, most)))
