"""How the sites of a layer are fitted, and the sums for it within the given memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from rain_mergekit.calibration.token_teachers import TaughtText, weights_of
from rain_mergekit.linalg.ridge_fit import RidgeRows, RidgeSums
from rain_mergekit.system.distributed import World

# Bytes a number of a site's square matrix: both sums, the eigenvectors, two to work in; float64.
MATRICES = 5 * 8


@dataclass(frozen=True)
class FitRule:
    """How each site of a layer is fitted.

    Attributes:
        epsilon: the ridge penalty ε; None: for each weight the one that fits held-out texts best.
        share: of the fitted energy that the low-rank change of a weight keeps.
        max_rank: upper bound of its rank.
        token_weight: weight of one token of a text that is fitted, by group.
        held_out_weight: weight of one token of a text that is held out, by group.
        budget: bytes that the sums of one site may take.
    """

    epsilon: float | None
    share: float
    max_rank: int
    token_weight: Mapping[str, float]
    held_out_weight: Mapping[str, float]
    budget: int

    def uses(self, text: TaughtText) -> bool:
        """Whether the text takes part: those held out do where ε is chosen by them."""
        return self.epsilon is None or not text.held_out

    def weights(self, text: TaughtText) -> Tensor:
        """The weight of each token, (n) float64."""
        return weights_of(text, self.held_out_weight if text.held_out else self.token_weight)


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
    if not needs_rows(width, rule.budget) or world.size > 1:
        return RidgeSums(width, outputs, world.device, choose=rule.epsilon is None), 1
    tokens = sum(len(text.groups) for text in texts if rule.uses(text))
    return RidgeRows(outputs), rows_within(width, sum(outputs.values()), tokens, rule.budget)


def sums_bytes(width: int) -> int:
    """What sums of d x d take for an input of that width: themselves, and their solution."""
    return MATRICES * width**2


def needs_rows(width: int, budget: int) -> bool:
    """Whether sums of d x d are beyond the budget, so that single tokens are kept."""
    return sums_bytes(width) > budget


def rows_within(width: int, outputs: int, tokens: int, budget: int) -> int:
    """The step between tokens that are used: 1 where all are, or where sums are.

    outputs: Σ d_out of the site.
    """
    if not needs_rows(width, budget):
        return 1
    # MATRICES n² + 4 row n = budget
    room = 2 * (outputs + width) / MATRICES
    most = int((room**2 + budget / MATRICES) ** 0.5 - room)
    return max(1, -(-tokens // max(1, most)))
