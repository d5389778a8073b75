"""The two factors U and V of one input site's projection."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """U and V of one site, both (d_in, r); v is u for an orthogonal projection.

    Both are None where nothing is projected (no site, or rank 0).
    """

    u: Tensor | None
    v: Tensor | None
