"""How attention heads lie in the rows and columns of the modules around them.

The only place that knows head layouts. They are tables by a module's name inside the attention
module, checked against its shape. Input sites need no table (see capture/input_sites.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from rain_mergekit.linalg.coefficients import expand_key_value, expand_query


class WeightKind(Enum):
    """What a linear module's output rows, or input columns, belong to."""

    QUERY = "query"  # rows: one block for each query head
    KEY_VALUE = "key_value"  # rows: one block for each key/value head
    OUTPUT = "output"  # columns: one block for each query head
    BLOCKS = "blocks"  # rows: all query heads, then all key heads, then all value heads
    GROUPS = "groups"  # rows: for each key/value head its query heads, its key, its value
    LAYER = "layer"  # no heads: one value for the whole module


# By the last part of a module's name, inside the attention module.
_NAMES: Mapping[str, WeightKind] = {
    "q_proj": WeightKind.QUERY,  # with an output gate: for each head its query, then its gate
    "q_b_proj": WeightKind.QUERY,  # latent attention: for each head its two parts of the query
    "kv_b_proj": WeightKind.QUERY,  # latent attention: for each head its key, then its value
    "gate_proj": WeightKind.QUERY,
    "g_proj": WeightKind.QUERY,
    "k_proj": WeightKind.KEY_VALUE,
    "v_proj": WeightKind.KEY_VALUE,
    "o_proj": WeightKind.OUTPUT,
    "out_proj": WeightKind.OUTPUT,
    "dense": WeightKind.OUTPUT,
    "c_proj": WeightKind.OUTPUT,
    "qkv_proj": WeightKind.BLOCKS,
    "c_attn": WeightKind.BLOCKS,
    "query_key_value": WeightKind.GROUPS,
}
# Latent attention's projections to the low rank.
_SHARED = ("q_a_proj", "kv_a_proj_with_mqa", "kv_a_proj")
# Modules that compute queries, keys and values, separate or fused.
_READING = frozenset(
    {"q_proj", "k_proj", "v_proj", *_SHARED, "q_b_proj", "kv_b_proj"}
    | {"qkv_proj", "c_attn", "query_key_value"}
)
# Exceptions by family.
_FAMILIES: Mapping[str, Mapping[str, WeightKind]] = {"gpt_bigcode": {"c_attn": WeightKind.GROUPS}}


def feeds_attention(name: str) -> bool:
    """Whether a module (or the site named after it) gives attention its queries, keys or values."""
    return name.rpartition(".")[2] in _READING


@dataclass(frozen=True)
class ModuleScale:
    """S_row (d_out) and S_col (d_in) of Eq. 16; None stands for ones."""

    rows: Tensor | None
    cols: Tensor | None


@dataclass(frozen=True)
class HeadLayout:
    """Heads of one layer's attention, as its computation showed them.

    module: the attention module's name within the layer. width: of a query and a key;
    value_width: of a value.
    """

    module: str
    heads: int
    kv_heads: int
    width: int
    value_width: int
    model_type: str = ""

    def kind(self, name: str, matrix: tuple[int, int]) -> WeightKind:
        """What rows and columns of a module (d_out, d_in) belong to, by name and shape.

        A module whose shape does not fit the heads gets one value: coarse, not wrong.
        """
        parent, _, last = name.rpartition(".")
        if parent != self.module:
            return WeightKind.LAYER
        kind = _FAMILIES.get(self.model_type, {}).get(last) or _NAMES.get(last, WeightKind.LAYER)
        return kind if _FITS[kind](self, matrix) else WeightKind.LAYER

    def lacks_heads(self, name: str, matrix: tuple[int, int]) -> bool:
        """Whether the module is part of the attention and still gets a single value.

        False for latent attention's low-rank projections, which all heads share.
        """
        parent, _, last = name.rpartition(".")
        inside = parent == self.module and last not in _SHARED
        return inside and self.kind(name, matrix) is WeightKind.LAYER

    def scales(self, name: str, alpha: Tensor, matrix: tuple[int, int]) -> ModuleScale:
        """Row and column factors of module `name` (d_out, d_in) for coefficients (n_heads)."""
        kind = self.kind(name, matrix)
        if kind is WeightKind.OUTPUT:
            return ModuleScale(None, expand_query(alpha, matrix[1] // self.heads))
        return ModuleScale(_ROWS[kind](self, alpha, matrix[0]), None)

    @property
    def fused(self) -> int:
        """Rows of queries, keys and values together."""
        return self.heads * self.width + self.kv_heads * (self.width + self.value_width)

    def fits_query(self, matrix: tuple[int, int]) -> bool:
        """Whether the rows are one block for each head, of a size that a head can have."""
        size, rest = divmod(matrix[0], self.heads)
        known = (self.width, 2 * self.width, self.value_width)
        latent = self.kv_heads == self.heads and size > self.value_width
        return rest == 0 and (size in known or latent)

    def fits_key_value(self, matrix: tuple[int, int]) -> bool:
        """Whether the rows are one key or one value for each key/value head."""
        return matrix[0] in (self.kv_heads * self.width, self.kv_heads * self.value_width)


def _layer(_layout: HeadLayout, alpha: Tensor, rows: int) -> Tensor:
    return alpha.mean().repeat(rows)


def _query(layout: HeadLayout, alpha: Tensor, rows: int) -> Tensor:
    return expand_query(alpha, rows // layout.heads)


def _key_value(layout: HeadLayout, alpha: Tensor, rows: int) -> Tensor:
    return expand_key_value(alpha, layout.kv_heads, rows // layout.kv_heads)


def _blocks(layout: HeadLayout, alpha: Tensor, _rows: int) -> Tensor:
    keys = expand_key_value(alpha, layout.kv_heads, layout.width)
    values = expand_key_value(alpha, layout.kv_heads, layout.value_width)
    return torch.cat([expand_query(alpha, layout.width), keys, values])


def _groups(layout: HeadLayout, alpha: Tensor, _rows: int) -> Tensor:
    queries = alpha.view(layout.kv_heads, -1)
    shared = queries.mean(1, keepdim=True)
    keys, values = shared.expand(-1, layout.width), shared.expand(-1, layout.value_width)
    return torch.cat([queries.repeat_interleave(layout.width, 1), keys, values], 1).flatten()


_ROWS: Mapping[WeightKind, Callable[[HeadLayout, Tensor, int], Tensor]] = {
    WeightKind.LAYER: _layer,
    WeightKind.QUERY: _query,
    WeightKind.KEY_VALUE: _key_value,
    WeightKind.BLOCKS: _blocks,
    WeightKind.GROUPS: _groups,
}
_FITS: Mapping[WeightKind, Callable[[HeadLayout, tuple[int, int]], bool]] = {
    WeightKind.LAYER: lambda _layout, _matrix: True,
    WeightKind.QUERY: HeadLayout.fits_query,
    WeightKind.KEY_VALUE: HeadLayout.fits_key_value,
    WeightKind.OUTPUT: lambda layout, matrix: matrix[1] == layout.heads * layout.value_width,
    WeightKind.BLOCKS: lambda layout, matrix: matrix[0] == layout.fused,
    WeightKind.GROUPS: lambda layout, matrix: matrix[0] == layout.fused,
}
