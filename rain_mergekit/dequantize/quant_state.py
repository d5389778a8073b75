"""What bitsandbytes writes beside four-bit codes: a JSON object, as the bytes of a tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rain_mergekit.system.untrusted_input import shown

# Behind a weight's name; the kind is that of the sixteen numbers, which are stored themselves.
STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
# As what the codes may be stored, two in each byte: bytes of a number.
CODE_BYTES = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
# More than bitsandbytes writes: bytes of a state, numbers of a block.
_LONGEST, _LARGEST = 4096, 4096


@dataclass(frozen=True)
class QuantState:
    """How the codes of one weight are laid out.

    Attributes:
        shape: rows and columns of the weight.
        block: numbers that share a scale.
        nested_block: scales that share a scale; 0: they are not quantised.
        offset: what is added to each of the quantised scales.
    """

    shape: tuple[int, int]
    block: int
    nested_block: int = 0
    offset: float = 0.0

    @property
    def count(self) -> int:
        """How many numbers the weight has."""
        return self.shape[0] * self.shape[1]

    @property
    def parts(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What stands beside the codes, in the formula's order: type and shape by its name."""
        blocks = math.ceil(self.count / self.block)
        if not self.nested_block:
            return {"absmax": ("F32", (blocks,)), "quant_map": ("F32", (16,))}
        return {
            "absmax": ("U8", (blocks,)),
            "quant_map": ("F32", (16,)),
            "nested_absmax": ("F32", (math.ceil(blocks / self.nested_block),)),
            "nested_quant_map": ("F32", (256,)),
        }


def read_state(stored: Tensor) -> QuantState:
    """The state in that tensor; ValueError that says what is not as bitsandbytes writes it.

    stored: [bytes], uint8.
    """
    if len(stored) > _LONGEST:
        raise ValueError(f"has {len(stored)} bytes, expected at most {_LONGEST}")
    fields = _fields(stored)
    shape = fields.get("shape")
    if not isinstance(shape, list) or len(shape) != 2:
        raise ValueError(f"says shape {shown(shape)}, expected rows and columns")
    rows, columns = (_count("shape", one) for one in shape)
    block = _block(fields, "blocksize")
    if block % 2:
        raise ValueError(f"says blocksize {block}, expected an even number")
    if "nested_blocksize" not in fields:
        return QuantState((rows, columns), block)
    kind, offset = fields.get("nested_dtype"), fields.get("nested_offset")
    if kind != "float32" or not isinstance(offset, float | int):
        raise ValueError(
            f"says nested_dtype {shown(kind)} and nested_offset {shown(offset)}, expected float32 "
            "and a number"
        )
    return QuantState((rows, columns), block, _block(fields, "nested_blocksize"), float(offset))


def _fields(stored: Tensor) -> Mapping[str, Any]:
    try:
        return dict(json.loads(bytes(stored.tolist())))
    except (ValueError, TypeError, RecursionError):
        raise ValueError("is not a JSON object") from None


def _block(fields: Mapping[str, Any], name: str) -> int:
    value = _count(name, fields.get(name))
    if value > _LARGEST:
        raise ValueError(f"says {name} {shown(value)}, expected at most {_LARGEST}")
    return value


def _count(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"says {name} {shown(value)}, expected whole numbers above 0")
    return value
