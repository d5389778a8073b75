"""How fast this machine multiplies, measured in less than a second."""

from __future__ import annotations

import time
from typing import Any

import torch

_SIDE, _SECONDS = 1024, 0.3


def multiply_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of products of square matrices, with torch's threads."""
    one = torch.ones(_SIDE, _SIDE, dtype=dtype, device=device)
    _multiply(one)  # the first one sets up libraries
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < _SECONDS:
        _multiply(one)
        count += 1
    return count * 2.0 * _SIDE**3 / (time.perf_counter() - start)


def _multiply(one: torch.Tensor) -> None:
    product = one @ one
    if product.device.type != "cpu":
        backend: Any = getattr(torch, product.device.type)
        backend.synchronize()
