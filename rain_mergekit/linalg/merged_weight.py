"""The merged weight of one matrix, in row blocks: Eq. 16, a fitted low-rank change, or both."""

from __future__ import annotations

import torch
from torch import Tensor

from rain_mergekit.linalg.factors import Factors

# A block's two float32 temporaries stay in a core's second-level cache; a GPU wants few launches.
BLOCK_ELEMENTS, BLOCK_ELEMENTS_GPU = 2**17, 2**25
MIN_BLOCK_ROWS = 128  # with fewer rows, reading U and V would take most of the time


def changed_weight(
    reasoning: Tensor, added: tuple[Tensor, Tensor], strength: float, input_axis: int = -1
) -> Tensor:
    """Compute W_R + λ A Bᵀ.

    Args:
        reasoning: W_R, (d_out, d_in); (d_in, d_out) with `input_axis` -2.
        added: A (d_out, r) and B (d_in, r).
        strength: λ.
        input_axis: the axis of the input features, -1 or -2.

    Returns:
        A new tensor like `reasoning`; computed in float32, or in float64 for float64 weights.
    """
    dtype = torch.float64 if reasoning.dtype == torch.float64 else torch.float32
    result = torch.empty_like(reasoning, memory_format=torch.contiguous_format)
    out, base = (t if input_axis == -1 else t.mT for t in (result, reasoning))
    a, b = (factor.to(reasoning.device, dtype) for factor in added)
    strength = _strength(strength, dtype)
    step = _block_rows(out)
    for start in range(0, out.shape[0], step):
        block = slice(start, start + step)
        out[block] = torch.addmm(base[block].to(dtype), a[block], b.mT, alpha=strength)
    return result


def merged_weight(
    weights: tuple[Tensor, Tensor, Tensor],
    factors: Factors | None,
    scales: tuple[Tensor | None, Tensor | None],
    strength: float,
    input_axis: int = -1,
) -> Tensor:
    """Compute W_R + λ (S_row Δ S_col)(I - U Vᵀ), with Δ = W_I - W_B (Eq. 16).

    Scales come first and the projection last, so that the change is zero on the protected
    features whatever the scales are. Blocks of output rows keep the temporaries in the cache.

    Args:
        weights: W_R, W_I and W_B of one shape, dtype and device: (d_out, d_in), or (d_in, d_out)
            with `input_axis` -2.
        factors: U and V; None where nothing is projected.
        scales: S_row (d_out) and S_col (d_in); None for ones.
        strength: λ.
        input_axis: the axis of the input features, -1 or -2.

    Returns:
        A new tensor like W_R; computed in float32, or in float64 for float64 weights.
    """
    like, device = weights[0], weights[0].device
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    result = torch.empty_like(like, memory_format=torch.contiguous_format)
    views = (result, *weights)
    out, base, tuned, origin = views if input_axis == -1 else (view.mT for view in views)
    scale_rows, scale_cols = (s if s is None else s.to(device, dtype) for s in scales)
    factors = None if factors is None else factors.to(device, dtype)
    strength = _strength(strength, dtype)
    step = _block_rows(out)
    space = torch.empty(2, min(step, out.shape[0]), out.shape[1], dtype=dtype, device=device)
    for start in range(0, out.shape[0], step):
        block = slice(start, start + step)
        delta, other = space[:, : out[block].shape[0]]
        delta.copy_(tuned[block]).sub_(other.copy_(origin[block]))
        if scale_rows is not None:
            delta *= scale_rows[block, None]
        if scale_cols is not None:
            delta *= scale_cols
        if factors is not None:
            factors.project_(delta)
        out[block] = other.copy_(base[block]).add_(delta, alpha=strength)
    return result


def _strength(value: float, dtype: torch.dtype) -> float:
    """λ in the type of the computation: infinite if out of range (torch would raise an error)."""
    return float(torch.tensor(value, dtype=dtype, device="cpu"))


def _block_rows(out: Tensor) -> int:
    elements = BLOCK_ELEMENTS if out.device.type == "cpu" else BLOCK_ELEMENTS_GPU
    return max(MIN_BLOCK_ROWS, elements // max(1, out.shape[1]))
