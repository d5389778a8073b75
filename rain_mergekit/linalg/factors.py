"""The projection I - U V^T of one input site, and applying it to a task vector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """U and V, both (d_in, r); `v is u` for an orthogonal projection. r = 0 changes nothing."""

    u: Tensor
    v: Tensor

    @classmethod
    def empty(cls, width: int) -> Factors:
        """Rank 0: the projection that changes nothing."""
        none = torch.empty(width, 0)
        return cls(none, none)

    @property
    def rank(self) -> int:
        """Number of protected directions."""
        return int(self.u.shape[1])

    def to(self, *where: torch.device | torch.dtype | Tensor) -> Factors:
        """The same factors on a device, in a type, or like a tensor."""
        u, v = self.u, self.v
        for target in where:
            u, v = u.to(target), v if self.v is self.u else v.to(target)
        return Factors(u, u if self.v is self.u else v)

    def project(self, delta: Tensor) -> Tensor:
        """Delta (I - U V^T) for Delta (d_out, d_in), Eq. 8: zero on span(U) whatever Delta is."""
        return self.to(delta).project_(delta.clone()) if self.rank else delta

    def project_(self, delta: Tensor) -> Tensor:
        """Project Delta in place; the factors must have its type and device."""
        return delta.addmm_(delta @ self.u, self.v.mT, alpha=-1) if self.rank else delta
