"""The attention function that transformers calls during calibration, and the probe that watches it.

Registered by name (`AttentionInterface`, `AttentionMaskInterface`), so that the layer's own module
hands over q, k, v after RoPE, QK-norm and everything else it does. The output is what transformers'
own SDPA gives; masks that SDPA cannot skip (sliding windows) are evaluated block by block, so that
no T x T matrix exists at any time.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import eager_mask

from rain_mergekit.errors import RainError
from rain_mergekit.system.context_value import holding

NAME = "rain_mergekit"
# The same function for families whose own code looks into the mask: they get it as a tensor.
DENSE = "rain_mergekit_dense"
BLOCK_BYTES = 64 * 1024 * 1024
_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


@dataclass(frozen=True)
class BlockMask:
    """A mask as a function of (query, key) indices, evaluated only for the rows at hand."""

    function: Callable[[Any, Any, Any, Any], Any]
    length: int

    def rows(self, index: Tensor) -> Tensor:
        """n x T bool, True where query row index[n] may attend."""
        zero = torch.zeros(1, dtype=torch.long, device=index.device)
        keys = torch.arange(self.length, device=index.device)
        allowed = self.function(zero, zero, index[:, None], keys[None, :])
        return torch.as_tensor(allowed).expand(index.numel(), self.length)


@dataclass(frozen=True)
class AttentionCall:
    """What one attention module computed with: q (1, H, T, d_h), k and v with KV heads."""

    module: nn.Module
    query: Tensor
    key: Tensor
    mask: BlockMask | Tensor | None
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    value_width: int

    def rows(self, index: Tensor) -> Tensor:
        """Attention probabilities of the query rows `index` (n): heads x n x T float32."""
        query = self.query[0, :, index].float()
        heads, count, width = query.shape
        key = self.key[0].float()
        grouped = query.view(key.shape[0], -1, width)
        scores = (grouped @ key.transpose(1, 2)).view(heads, count, -1) * self.scaling
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        allowed = _allowed(self.mask, index, scores.shape[-1])
        if allowed.dtype == torch.bool:
            scores = scores.masked_fill(~allowed, float("-inf"))
        else:
            scores = scores + allowed.float()
        return _softmax_with_sinks(scores, self.sinks)

    @property
    def heads(self) -> Heads:
        """Which module it was and the sizes of its heads."""
        query, key = self.query.shape, self.key.shape
        return Heads(self.module, query[1], key[1], query[-1], self.value_width)


@dataclass(frozen=True)
class Heads:
    """Sizes of one attention module's heads; width: of queries and keys."""

    module: nn.Module
    heads: int
    kv_heads: int
    width: int
    value_width: int


Observer = Callable[[AttentionCall], None]
_OBSERVER: ContextVar[Observer | None] = ContextVar("rain_attention_observer", default=None)


def observe_attention(observer: Observer) -> AbstractContextManager[None]:
    """Call `observer` with every attention computation inside the block."""
    return holding(_OBSERVER, observer)


def register() -> None:
    """Make the attention function known to transformers; idempotent."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    AttentionInterface.register(DENSE, _attention)
    AttentionMaskInterface.register(DENSE, eager_mask)


# The mask of attention scores; recurrent layers use another one, of padding.
_LOOKED_INTO = re.compile(
    r"_mask\.(dtype|masked_fill)\b|_mask\[:, 0|masked_fill\(\s*~?\s*(attention|causal)_mask"
)


def name_for(layers: nn.Module) -> str:
    """The name of the attention function that the layers need, found in their source code.

    Layers that select keys themselves (an indexer) read the mask, so they get it as a tensor.
    """
    for kind in {type(module) for module in layers.modules()}:
        if kind.__module__.startswith("torch."):
            continue
        try:
            source = inspect.getsource(kind)
        except (OSError, TypeError):
            continue  # a class that was compiled or made at run time has no source
        if _LOOKED_INTO.search(source):
            return DENSE
    return NAME


def _mask(  # noqa: PLR0917 - transformers' interface
    batch_size: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    q_length: int,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **_kwargs: Any,
) -> BlockMask | None:
    # Older versions of OPT make a mask themselves, of nothing but ones.
    padded = attention_mask is not None and not bool(attention_mask.all())
    if batch_size != 1 or q_length != kv_length or padded:
        raise ValueError("calibration runs one unpadded, uncached sample at a time")
    if allow_is_causal_skip and (local_size is None or kv_length <= local_size):
        return None
    return BlockMask(mask_function, kv_length)


def _attention(  # noqa: PLR0913, PLR0917 - transformers' interface
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001 - calibration never drops
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    attention_mask = _without_left_out(attention_mask, kwargs, key.shape[2])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    width = value.shape[-1]
    call = AttentionCall(module, query, key, attention_mask, scale, softcap, s_aux, width)
    observer = _OBSERVER.get()
    if observer is not None:
        observer(call)
    if softcap is not None or s_aux is not None:
        return torch.cat([_explicit_blocks(one, v) for one, v in _each(call, value)]), None
    if attention_mask is not None:
        return _masked_blocks(call, value), None
    if _needs_own_heads(query):
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale
        )
        return output.transpose(1, 2).contiguous(), None
    output, _ = sdpa_attention_forward(
        module, query, key, value, None, dropout=0.0, scaling=scale, is_causal=True
    )
    return output, None


def _needs_own_heads(query: Tensor) -> bool:
    """Whether key and value heads must be repeated, one for each query head.

    On a GPU torch shares them in its flash kernel, which knows no float32, and else in the plain
    one, which holds T x T scores. On a CPU older releases share them in the plain one alone.
    """
    if query.device.type == "cpu":
        return _TORCH < (2, 13)  # the oldest that was seen to do it in its flash kernel
    return query.dtype == torch.float32


def _masked_blocks(call: AttentionCall, value: Tensor) -> Tensor:
    """SDPA over blocks of query rows, each with its own slice of the mask: (1, T, H, d_h)."""
    groups = call.query.shape[1] // call.key.shape[1]
    key, value = repeat_kv(call.key, groups), repeat_kv(value, groups)
    parts = []
    for index in _row_blocks(call.query, call.key.shape[2]):
        allowed = _allowed(call.mask, index, key.shape[2])
        if allowed.dtype != torch.bool:
            allowed = allowed.to(call.query.dtype)
        parts.append(
            nn.functional.scaled_dot_product_attention(
                call.query[:, :, index], key, value, attn_mask=allowed, scale=call.scaling
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _each(call: AttentionCall, value: Tensor) -> Iterator[tuple[AttentionCall, Tensor]]:
    """One text after the other, of several that pass together."""
    for query, key, own in zip(call.query, call.key, value, strict=True):
        yield replace(call, query=query[None], key=key[None]), own[None]


def _explicit_blocks(call: AttentionCall, value: Tensor) -> Tensor:
    """For score transforms that SDPA does not know (softcap, sinks): (1, T, H, d_h)."""
    values = repeat_kv(value, call.query.shape[1] // value.shape[1])[0]
    blocks = _row_blocks(call.query, call.key.shape[2])
    parts = [call.rows(index).to(values.dtype) @ values for index in blocks]
    return torch.cat(parts, dim=1)[None].transpose(1, 2).contiguous()


def _row_blocks(query: Tensor, length: int) -> Iterator[Tensor]:
    step = max(1, BLOCK_BYTES // (query.shape[1] * length * 4))
    for start in range(0, query.shape[2], step):
        stop = min(start + step, query.shape[2])
        yield torch.arange(start, stop, device=query.device)


def _without_left_out(
    mask: BlockMask | Tensor | None, passed: Mapping[str, Any], length: int
) -> BlockMask | Tensor | None:
    """The mask without the keys that an indexer left out, among what is passed on to attention.

    Families with an indexer apply its choice themselves for attention of transformers' own names,
    and pass it on to any other: `indices` are the chosen keys, 1 x T x n. RainError for a choice in
    another form, which would be ignored.
    """
    chosen = {k: v for k, v in passed.items() if k.endswith("indices") and v is not None}
    indices: Tensor | None = chosen.pop("indices", None)
    if chosen:
        raise RainError(
            f"its attention chooses keys by {', '.join(chosen)}, which a calibration layer by "
            "layer does not support; the model cannot be calibrated"
        )
    if indices is None:
        return mask
    left_out = indices.new_ones((1, indices.shape[1], length), dtype=torch.bool)
    left_out = left_out.scatter(-1, indices.long(), False)[:, None]
    if not isinstance(mask, Tensor):
        queries = torch.arange(indices.shape[1], device=indices.device)
        mask = _allowed(mask, queries, length)[None, None]
    if mask.dtype == torch.bool:
        return mask & ~left_out
    return mask.masked_fill(left_out, torch.finfo(mask.dtype).min)


def _allowed(mask: BlockMask | Tensor | None, index: Tensor, length: int) -> Tensor:
    """What the query rows `index` may attend to: n x T bool, or of a whole mask heads x n x T.

    Numbers of a whole mask are to be added to the scores.
    """
    if isinstance(mask, Tensor):
        return mask[0][:, index, :length]
    if mask is not None:
        return mask.rows(index)
    return torch.arange(length, device=index.device)[None, :] <= index[:, None]


def _softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.float().view(-1, 1, 1).expand(scores.shape[0], scores.shape[1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]
