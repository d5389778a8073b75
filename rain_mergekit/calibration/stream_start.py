"""Where a weight of stream matching starts: on the way from the reasoning to the instruct model."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Start: TypeAlias = float | Literal["auto"]
SHARE = 0.5  # of the way, chosen on small trios; a language model gains little and loses nothing
# ‖W_I - W_R‖ / ‖W_R‖ above which a weight starts as the reasoning model's. A change of low rank has
# to take back what the thinking notices; in measured pairs no weight is farther.
MOST_APART = 0.25


def moved(own: Tensor, goal: Tensor, start: Start) -> tuple[Tensor, float]:
    """Move one weight.

    Args:
        own: W_R, of any shape.
        goal: W_I, of the same shape.
        start: the share of the way; auto: SHARE, or 0 for a weight that is more than MOST_APART
            from the other one.

    Returns:
        W_R + s (W_I - W_R), computed in float32 or wider and cast to the type of `own`, and s.
    """
    base = own.to(torch.promote_types(own.dtype, torch.float32))
    ahead = goal.to(base) - base
    near = start != "auto" or bool(ahead.norm() <= MOST_APART * base.norm())
    share = (SHARE if start == "auto" else start) if near else 0.0
    return (base.add(ahead, alpha=share).to(own) if share else own), share
