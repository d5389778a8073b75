"""The merged weight in row blocks: Eq. 16, a fitted low-rank change, or scaled task vectors."""

from __future__ import annotations

from collections.abc import Sequence

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


def changed_experts(
    reasoning: Tensor,
    added: tuple[Tensor, Tensor],
    ranks: Sequence[int],
    strength: float,
    input_axis: int = -1,
) -> Tensor:
    """Compute W_R + λ A Bᵀ for each expert of a weight (E, ...).

    ranks: how many columns of A (d_out, r) and B (d_in, r) belong to each expert, in order; the
    rest as for `changed_weight`.
    """
    result = torch.empty_like(reasoning, memory_format=torch.contiguous_format)
    factors = zip(*(torch.split(one, list(ranks), dim=1) for one in added), strict=True)
    for expert, own in enumerate(factors):
        result[expert] = changed_weight(reasoning[expert], own, strength, input_axis)
    return result


def merged_weight(
    weights: tuple[Tensor, Tensor, Tensor],
    factors: Factors | None,
    scales: tuple[Tensor | None, Tensor | None],
    strength: float,
    input_axis: int = -1,
    gamma: float = 0.0,
) -> Tensor:
    """Compute W_R + λ (S_row Δ S_col)(I - U Vᵀ), with Δ = (W_I - W_B) - gamma (W_R - W_B) (Eq. 16).

    Scales come first and the projection last, so that the change is zero on the protected
    features whatever the scales are. Blocks of output rows keep the temporaries in the cache.

    Args:
        weights: W_R, W_I and W_B of one shape, dtype and device: (d_out, d_in), or (d_in, d_out)
            with `input_axis` -2.
        factors: U and V; None where nothing is projected.
        scales: S_row (d_out) and S_col (d_in); None for ones.
        strength: λ.
        input_axis: the axis of the input features, -1 or -2.
        gamma: 0 gives the paper's Δ, 1 gives W_I - W_R, which does not depend on W_B.

    Returns:
        A new tensor like W_R; computed in float32, or in float64 for float64 weights.
    """
    like, device = weights[0], weights[0].device
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    result = torch.empty_like(like, memory_format=torch.contiguous_format)
    views = (result, *weights)
    out, base, tuned, origin = views if input_axis == -1 else (view.mT for view in views)
    origin = base if gamma == 1 else origin
    scale_rows, scale_cols = (s if s is None else s.to(device, dtype) for s in scales)
    factors = None if factors is None else factors.to(device, dtype)
    strength = _strength(strength, dtype)
    step = _block_rows(out)
    space = torch.empty(2, min(step, out.shape[0]), out.shape[1], dtype=dtype, device=device)
    for start in range(0, out.shape[0], step):
        block = slice(start, start + step)
        delta, other = space[:, : out[block].shape[0]]
        delta.copy_(tuned[block]).sub_(other.copy_(origin[block]))
        if 0 < gamma < 1:
            delta.sub_(other.neg_().add_(base[block]), alpha=gamma)
        if scale_rows is not None:
            delta *= scale_rows[block, None]
        if scale_cols is not None:
            delta *= scale_cols
        if factors is not None:
            factors.project_(delta)
        out[block] = other.copy_(base[block]).add_(delta, alpha=strength)
    return result


def summed_weight(
    base: Tensor,
    tuned: Sequence[tuple[Tensor, float]],
    cols: Tensor | None,
    strength: float,
    input_axis: int = -1,
) -> Tensor:
    """Compute W_B + λ (Σ w_i (W_i - W_B)) S_col.

    Args:
        base: W_B, of any shape.
        tuned: W_i and w_i.
        cols: S_col (d_in); None for ones; must be None for tensors of less than two dimensions.
        strength: λ.
        input_axis: the axis of the input features, -1 or -2.

    Returns:
        A new tensor like W_B; computed in float32, or in float64 for float64 weights.
    """
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    result = torch.empty_like(base, memory_format=torch.contiguous_format)
    width = base.shape[-1] if base.dim() > 1 else base.numel()
    out, origin = result.view(-1, width), base.reshape(-1, width)
    others = [(tensor.reshape(-1, width), weight) for tensor, weight in tuned]
    scale = torch.ones(1, 1) if cols is None else cols[None] if input_axis == -1 else cols[:, None]
    scale = scale.to(base.device, dtype) * _strength(strength, dtype)
    if input_axis == -2:  # each matrix has all input features as its rows
        scale = scale.repeat(out.shape[0] // scale.shape[0], 1)
    step = max(1, _block_elements(out) // width)
    space = torch.empty(3, min(step, out.shape[0]), width, dtype=dtype, device=base.device)
    for start in range(0, out.shape[0], step):
        block = slice(start, start + step)
        own, total, delta = space[:, : out[block].shape[0]]
        own.copy_(origin[block])
        total.zero_()
        for tensor, weight in others:
            total.add_(delta.copy_(tensor[block]).sub_(own), alpha=weight)
        total *= scale if input_axis == -1 else scale[block]
        out[block] = own.add_(total)
    return result


def _strength(value: float, dtype: torch.dtype) -> float:
    """λ in the type of the computation: infinite if out of range (torch would raise an error)."""
    return float(torch.tensor(value, dtype=dtype, device="cpu"))


def _block_rows(out: Tensor) -> int:
    return max(MIN_BLOCK_ROWS, _block_elements(out) // max(1, out.shape[1]))


def _block_elements(out: Tensor) -> int:
    return BLOCK_ELEMENTS if out.device.type == "cpu" else BLOCK_ELEMENTS_GPU
