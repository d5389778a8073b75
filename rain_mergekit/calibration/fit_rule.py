"""How the sites of a layer are fitted, and within how many directions the memory allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rain_mergekit.calibration.token_teachers import TaughtText, weights_of
from rain_mergekit.linalg.landmarks import evenly_by_weight

# Bytes a number of a site's square matrix: both sums, the eigenvectors, two to work in; float64.
MATRICES = 5 * 8
# Bytes a number of the landmarks: themselves, their copy that is factored, the basis; float32.
LANDMARKS = 3 * 4


@dataclass(frozen=True)
class FitRule:
    """How each site of a layer is fitted.

    Attributes:
        epsilon: the ridge penalty ε; None: for each weight by held-out texts.
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


def sums_bytes(width: int) -> int:
    """What sums of d x d take for an input of that width: themselves, and their solution."""
    return MATRICES * width**2


def directions_within(width: int, budget: int) -> int:
    """m, the directions in which an input of width d is fitted: d where its sums fit the budget."""
    if sums_bytes(width) <= budget:
        return width
    # MATRICES m² + LANDMARKS d m = budget
    half = LANDMARKS * width / (2 * MATRICES)
    return max(1, int((half**2 + budget / MATRICES) ** 0.5 - half))


def landmarks(texts: Sequence[TaughtText], rule: FitRule, count: int) -> dict[int, Tensor]:
    """At most `count` fitted tokens, spread by weight: their positions, by the text's index.

    Where texts begin alike their first tokens are the same, and are taken from one of them.
    """
    fitted = [index for index, text in enumerate(texts) if not text.held_out]
    weights = [rule.weights(texts[index]) for index in fitted]
    seen: set[int] = set()
    fresh = [_fresh(texts[index].input_ids, seen) for index in fitted]
    counted = [(one * new).nonzero().flatten() for one, new in zip(weights, fresh, strict=True)]
    every = torch.cat([one[at] for one, at in zip(weights, counted, strict=True)])
    taken = torch.zeros(len(every), dtype=torch.bool)
    taken[evenly_by_weight(every, count)] = True
    parts = torch.split(taken, [len(at) for at in counted])
    found = zip(fitted, counted, parts, strict=True)
    return {index: at[here] for index, at, here in found if here.any()}


def _fresh(ids: Sequence[int], seen: set[int]) -> Tensor:
    """Whether a token is the first after all those before it, (n) bool; `seen` grows."""
    found, before = [], 0
    for token in ids:
        before = hash((before, token))
        found.append(before not in seen)
        seen.add(before)
    return torch.tensor(found, dtype=torch.bool)
