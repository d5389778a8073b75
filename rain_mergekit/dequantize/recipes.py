"""What each tensor of the plain checkpoint is made of, judged from headers before any work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from rain_mergekit.calibration_file.container import DTYPES
from rain_mergekit.dequantize.formulas import (
    eight_bits,
    four_bits,
    fp8,
    mxfp4,
    packed_integers,
)
from rain_mergekit.dequantize.quant_state import CODE_BYTES, STATES, read_state
from rain_mergekit.errors import RainError
from rain_mergekit.models.checkpoint import PLAIN_TYPES, Checkpoint, header_entries
from rain_mergekit.models.published_format import BITSANDBYTES, FP8, MXFP4, PublishedFormat

Read: TypeAlias = "Callable[[str], Tensor]"
Shape: TypeAlias = "tuple[int, ...]"

_FP8_SCALES = ("_scale_inv", "_scale")  # behind the weight's name
# Of activations: a plain model has no use for them.
_ACTIVATIONS = ("input_scale", "activation_scale")
_CACHE = (".k_scale", ".v_scale", ".q_scale")
_PACKED, _BLOCKS, _SCALES = "weight_packed", "_blocks", "_scales"
_SCALE_TYPES = ("F32", "BF16", "F16")
# A tensor with such a name belongs to a quantised weight, and says nothing without it.
_PARTS = (
    *("weight_scale", "weight_scale_inv", "_proj_scale_inv", "_proj_scale", "weight_zero_point"),
    *("weight_shape", "weight_g_idx", _PACKED, "_proj_blocks", "_proj_scales"),
    *(".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *STATES),
    *(".SCB", ".weight_format"),
)
_BYTES_OF_A_ROW, _SHOWN = 16, 5


@dataclass(frozen=True)
class Recipe:
    """One tensor of the plain checkpoint.

    Attributes:
        name: what it is called there.
        dtype: how it is stored there.
        shape: as stored there.
        parts: the tensors of the quantised checkpoint that it is made of, in the formula's order.
        formula: None where the only part is copied.
    """

    name: str
    dtype: torch.dtype
    shape: Shape
    parts: tuple[str, ...]
    formula: Callable[..., Tensor] | None = None

    @property
    def bytes(self) -> int:
        """What it takes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self, read: Read) -> Iterator[Tensor]:
        """The tensor in pieces that follow each other, one expert at a time where it has several.

        read: a tensor of the quantised checkpoint by its name.
        """
        tensors = [read(part) for part in self.parts]
        if self.formula is None:
            yield tensors.pop()
        elif len(self.shape) > 2:
            for index in range(self.shape[0]):
                yield self.piece(tensors, index)
        else:
            yield self.formula(*tensors)

    def piece(self, tensors: list[Tensor], index: int) -> Tensor:
        """One expert of a tensor that has several; tensors: what `parts` names."""
        rows = [t[index] if t.dim() > 1 else t for t in tensors]
        return rows[0] if self.formula is None else self.formula(*rows)


def recipes(checkpoint: Checkpoint, found: PublishedFormat) -> list[Recipe]:
    """Of all tensors, in the order of the shards.

    RainError that lists what is missing, has another shape, or belongs to no format.
    """
    entries = header_entries(checkpoint.index, checkpoint.names)
    plan = _Plan(checkpoint, entries, found)
    order = [name for shard in checkpoint.index.shards for name in sorted(shard.contained_keys)]
    plan.take(name for name in order if name in entries)
    absent = sorted(checkpoint.names - entries.keys())
    problems = [*(f"{name} is in the index and in no shard" for name in absent), *plan.problems]
    if not problems and not any(one.formula for one in plan.recipes):
        problems = [f"no tensor is stored as {found.words}, which its config.json names"]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise RainError(
            f"{checkpoint.reference}: its weights cannot be dequantised: "
            f"{'; '.join(problems[:_SHOWN])}{more}; fetch the model again, or report the format"
        )
    return plan.recipes


class _Plan:
    """Collects recipes, what they use up, and what does not fit."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        entries: Mapping[str, tuple[str, Shape]],
        found: PublishedFormat,
    ) -> None:
        self._checkpoint, self._entries, self._format = checkpoint, entries, found
        self._used: set[str] = set()
        self._misfits: list[str] = []
        self.recipes: list[Recipe] = []
        self.problems: list[str] = []

    def take(self, names: Iterable[str]) -> None:
        """The recipes of all these tensors."""
        makers = {FP8: self._fp8, MXFP4: self._mxfp4, BITSANDBYTES: self._bitsandbytes}
        make = makers.get(self._format.kind or "", self._packed)
        order = list(names)
        made: dict[str, Recipe] = {}
        for name in order:
            try:
                recipe = make(name)
            except _MisfitError as error:
                self.problems.append(str(error))
                self._misfits.append(name.removesuffix("_packed").removesuffix(_BLOCKS))
                continue
            if recipe is not None:
                made[name] = recipe
                self._used |= {*recipe.parts, *_activation_scales(recipe.name)}
        told = tuple(self._misfits)
        left = (n for n in order if n not in self._used and not (told and n.startswith(told)))
        rest = {name: self._copied(name) for name in left}
        found = (made.get(name) or rest.get(name) for name in order)
        self.recipes = [recipe for recipe in found if recipe is not None]

    def _copied(self, name: str) -> Recipe | None:
        """A tensor that is not quantised; None for one that has no place in a plain model."""
        stored, shape = self._entries[name]
        if name.endswith(_CACHE) and math.prod(shape) == 1:
            return None
        if name.endswith(_PARTS):
            self.problems.append(f"{name} belongs to no quantised weight")
        elif stored not in DTYPES or (stored not in PLAIN_TYPES and len(shape) > 1):
            self.problems.append(
                f"{name} is stored as {stored} {list(shape)}, which is not {self._format.words}"
            )
        else:
            return Recipe(name, DTYPES[stored], shape, (name,))
        return None

    def _fp8(self, name: str) -> Recipe | None:
        stored, shape = self._entries[name]
        if stored != "F8_E4M3":
            return None
        names = [name + ending for ending in _FP8_SCALES]
        scale = next((one for one in names if one in self._entries), None)
        if scale is None:
            raise _MisfitError(f"{name} has no scale: neither {names[0]} nor {names[1]} is there")
        self._require(scale, _SCALE_TYPES, _fp8_scales(shape, self._format.block))
        formula = partial(fp8, block=self._format.block)
        return Recipe(name, torch.bfloat16, shape, (name, scale), formula)

    def _mxfp4(self, name: str) -> Recipe | None:
        stored, shape = self._entries[name]
        if stored != "U8" or not name.endswith(_BLOCKS):
            return None
        plain = name.removesuffix(_BLOCKS)
        if len(shape) != 4 or shape[-1] != _BYTES_OF_A_ROW:
            raise _MisfitError(f"{name} is {list(shape)}, expected [experts, rows, blocks, 16]")
        self._require(plain + _SCALES, ("U8",), [shape[:-1]])
        experts, rows, blocks, _ = shape
        new = (experts, blocks * 2 * _BYTES_OF_A_ROW, rows)
        return Recipe(plain, torch.bfloat16, new, (name, plain + _SCALES), mxfp4)

    def _packed(self, name: str) -> Recipe | None:
        stored, words = self._entries[name]
        if stored != "I32" or not name.endswith(f".{_PACKED}"):
            return None
        stem, known = name.removesuffix("_packed"), self._format
        self._require(f"{stem}_shape", ("I64", "I32"), [(2,)])
        shape = rows, columns = self._numbers(f"{stem}_shape")
        each, group = 32 // known.bits, known.group or columns
        if words != (rows, math.ceil(columns / each)):
            raise _MisfitError(
                f"{name} is {list(words)}, which does not hold {list(shape)} numbers of "
                f"{known.bits} bits"
            )
        groups = math.ceil(columns / group)
        whole = [(1,), ()] if known.group is None else []
        self._require(f"{stem}_scale", _SCALE_TYPES, [(rows, groups), *whole])
        parts = [name, f"{stem}_scale"]
        if known.zero_points:
            parts.append(f"{stem}_zero_point")
            self._require(parts[-1], ("I32",), [(math.ceil(rows / each), groups)])
        if f"{stem}_g_idx" in self._entries:
            parts.append(f"{stem}_g_idx")
            self._require_order(parts[-1], columns, groups)
        self._used.add(f"{stem}_shape")
        formula = partial(
            packed_integers,
            shape=shape,
            bits=known.bits,
            group=group,
            zero_points=known.zero_points,
        )
        return Recipe(stem, torch.bfloat16, shape, tuple(parts), formula)

    def _bitsandbytes(self, name: str) -> Recipe | None:
        state = next((name + end for end in STATES if name + end in self._entries), None)
        if state is not None:
            return self._four_bits(name, state)
        stored, shape = self._entries[name]
        if stored != "I8" or not name.endswith(".weight") or len(shape) != 2:
            return None
        stem = name.removesuffix("weight")
        scale, order = f"{stem}SCB", f"{stem}weight_format"
        self._used |= {scale, order}
        self._require(scale, ("F32",), [shape[:1]])
        if order in self._entries and self._checkpoint.get(order).any():
            raise _MisfitError(f"{name} is in an order of old versions: {order} is not 0")
        return Recipe(name, torch.bfloat16, shape, (name, scale), eight_bits)

    def _four_bits(self, name: str, state: str) -> Recipe:
        self._require(state, ("U8",), [self._entries[state][1][:1]])
        try:
            found = read_state(self._checkpoint.get(state))
        except ValueError as error:
            raise _MisfitError(f"{state} {error}") from None
        stored, shape = self._entries[name]
        halves = 2 * math.prod(shape) * CODE_BYTES.get(stored, 0)
        if halves != found.count + found.count % 2:
            what = f"{list(found.shape)} numbers of 4 bits"
            raise _MisfitError(f"{name} is {stored} {list(shape)}, which does not hold {what}")
        for part, (kind, size) in found.parts.items():
            self._require(f"{name}.{part}", (kind,), [size])
        self._used.add(state)
        formula = partial(
            four_bits,
            shape=found.shape,
            block=found.block,
            nested_block=found.nested_block,
            offset=found.offset,
        )
        parts = (name, *(f"{name}.{part}" for part in found.parts))
        return Recipe(name, torch.bfloat16, found.shape, parts, formula)

    def _require(self, name: str, types: Iterable[str], shapes: list[Shape]) -> None:
        """_MisfitError unless there is such a tensor, of one of the types and shapes."""
        if name not in self._entries:
            raise _MisfitError(f"{name} is missing")
        stored, shape = self._entries[name]
        if shape not in shapes:
            expected = " or ".join(str(list(one)) for one in shapes)
            raise _MisfitError(f"{name} is {list(shape)}, expected {expected}")
        if stored not in types:
            raise _MisfitError(f"{name} is stored as {stored}, expected {' or '.join(types)}")

    def _require_order(self, name: str, columns: int, groups: int) -> None:
        self._require(name, ("I32", "I64"), [(columns,)])
        order = self._checkpoint.get(name)
        if int(order.min()) < 0 or int(order.max()) >= groups:
            raise _MisfitError(f"{name} names groups that are not among the {groups} there are")

    def _numbers(self, name: str) -> tuple[int, int]:
        rows, columns = (int(number) for number in self._checkpoint.get(name).tolist())
        if min(rows, columns) < 1:
            raise _MisfitError(f"{name} says [{rows}, {columns}], expected rows and columns")
        return rows, columns


class _MisfitError(Exception):
    """What is wrong with one quantised weight."""


def _fp8_scales(shape: Shape, block: tuple[int, int] | None) -> list[Shape]:
    """The shapes that the scale of a weight may have."""
    if block is not None and len(shape) > 1:
        rows, columns = (math.ceil(n / size) for n, size in zip(shape[-2:], block, strict=True))
        return [(*shape[:-2], rows, columns)]
    by_row = [(*shape[:-1], 1), (*shape[:-2], 1, 1)] if len(shape) > 1 else []
    return [*by_row, (1,), ()]


def _activation_scales(name: str) -> Iterator[str]:
    stem = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
    return (f"{stem}{word}" for word in _ACTIVATIONS)
