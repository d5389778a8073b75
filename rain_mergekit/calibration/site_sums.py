"""The sums of one input site: of d x d, or of m x m where those exceed the memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from rain_mergekit.calibration.fit_rule import FitRule, directions_within, landmarks
from rain_mergekit.calibration.token_teachers import TaughtText
from rain_mergekit.linalg.landmarks import LandmarkSums, spanned
from rain_mergekit.linalg.ridge_fit import RidgeSums
from rain_mergekit.system.distributed import World

LOG = logging.getLogger(__name__)
Sums: TypeAlias = "RidgeSums | LandmarkSums"


def empty_sums(
    site: tuple[str, int, Mapping[str, int]],
    texts: Sequence[TaughtText],
    features: Callable[[Mapping[int, Tensor]], Tensor],
    rule: FitRule,
    world: World,
) -> Sums:
    """Sums to which nothing is added yet.

    site: its name, its width d, and d_out of each weight. features: from some tokens of each text
    to theirs, (m, d), for the directions within which a wide site is fitted.
    """
    name, width, outputs = site
    choose = rule.epsilon is None
    count = directions_within(width, rule.budget)
    if count == width:
        return RidgeSums(width, outputs, world.device, choose=choose)
    LOG.info("%s: fitted within %d of %d directions", name, count, width)
    own = features(landmarks(texts, rule, count // world.size))
    return sums_within(own, outputs, world, choose=choose)


def sums_within(
    own: Tensor, outputs: Mapping[str, int], world: World, *, choose: bool
) -> LandmarkSums:
    """Sums within the directions of all processes' tokens; own: this one's, (m, d).

    choose: whether there are tokens held aside, to choose ε by.
    """
    basis = world.same(spanned(world.rows(own)))  # not equal up to rounding alone
    return LandmarkSums(basis, outputs, choose=choose)
