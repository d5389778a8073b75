"""Whether a tensor is free of NaN and infinity."""

from __future__ import annotations

import torch
from torch import Tensor


def finite(tensor: Tensor) -> bool:
    """Whether no element of the tensor, of any shape and number type, is NaN or infinite.

    Minimum and maximum propagate NaN and infinity, and need no temporary of the tensor's size.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))
