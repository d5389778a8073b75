"""Which linear modules a decoder layer has, and how attention heads lie in their rows and columns.

The only place that knows head layouts. Input sites need no table: modules that see the same tensor
share one, which the capture observes while the layer runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from rain_mergekit.coefficients import expand_key_value, expand_query
from rain_mergekit.errors import RainError


class Kind(Enum):
    """What a linear module's rows and columns belong to."""

    QUERY = "query"  # rows: query heads
    KEY_VALUE = "key_value"  # rows: key/value heads
    OUTPUT = "output"  # columns: query heads
    LAYER = "layer"  # no heads: one value for the whole module


_LLAMA_STYLE: Mapping[str, Kind] = {
    "self_attn.q_proj": Kind.QUERY,
    "self_attn.k_proj": Kind.KEY_VALUE,
    "self_attn.v_proj": Kind.KEY_VALUE,
    "self_attn.o_proj": Kind.OUTPUT,
    "mlp.gate_proj": Kind.LAYER,
    "mlp.up_proj": Kind.LAYER,
    "mlp.down_proj": Kind.LAYER,
}

LAYOUTS: Mapping[str, Mapping[str, Kind]] = {
    "llama": _LLAMA_STYLE,
    "mistral": _LLAMA_STYLE,
    "qwen2": _LLAMA_STYLE,
    "qwen3": _LLAMA_STYLE,
}


@dataclass(frozen=True)
class HeadLayout:
    """Heads of one decoder's attention, and the kind of each linear module by its name."""

    heads: int
    kv_heads: int
    head_dim: int
    kinds: Mapping[str, Kind]

    def scales(self, module: str, alpha: Tensor, shape: tuple[int, int]) -> ModuleScale:
        """Row and column factors of `module` (out x in) for coefficients alpha (n_heads)."""
        kind = self.kinds[module]
        if kind is Kind.QUERY:
            return ModuleScale(expand_query(alpha, self.head_dim), None)
        if kind is Kind.KEY_VALUE:
            return ModuleScale(expand_key_value(alpha, self.kv_heads, self.head_dim), None)
        if kind is Kind.OUTPUT:
            return ModuleScale(None, expand_query(alpha, self.head_dim))
        return ModuleScale(torch.full((shape[0],), float(alpha.mean()), dtype=alpha.dtype), None)


@dataclass(frozen=True)
class ModuleScale:
    """S_row (d_out) and S_col (d_in) of Eq. 16; None stands for ones."""

    rows: Tensor | None
    cols: Tensor | None


def head_layout(config: Any) -> HeadLayout:
    """The layout of a transformers config; RainError names an architecture that is not covered."""
    kinds = LAYOUTS.get(config.model_type)
    if kinds is None:
        raise RainError(
            f"architecture {config.model_type!r} is not supported yet: its head layout is not "
            f"known (supported: {', '.join(sorted(LAYOUTS))})"
        )
    heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return HeadLayout(heads, int(kv_heads), int(head_dim), kinds)
