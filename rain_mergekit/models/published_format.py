"""In which format a model is published, by the `quantization_config` of its config.json."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit.common import ModelReference

from rain_mergekit.errors import RainError
from rain_mergekit.models.checkpoint import PLAIN_TYPES, header_entries, open_index
from rain_mergekit.models.config_file import read_config_file, section_of
from rain_mergekit.system.untrusted_input import shown

FP8, MXFP4, PACKED, BITSANDBYTES = "fp8", "mxfp4", "packed", "bitsandbytes"
_BITS = (4, 8)  # of a packed integer: 8 or 4 of them fill 32 bits
_PLAIN_COPY = "take the model as it was published in bfloat16"
# What each format of others is called, and what would be needed to read it.
_NAMES = {"gptq": "GPTQ", "awq": "AWQ", "gguf": "GGUF"}
# Whose plain weights are stored transposed, and those of bitsandbytes are not.
_TRANSPOSED = ("gpt2", "openai-gpt")


@dataclass(frozen=True)
class PublishedFormat:
    """How quantised weights are stored.

    Attributes:
        words: the format's name in messages.
        kind: the formula, FP8, MXFP4, PACKED or BITSANDBYTES; None: it is not read here.
        needs: what to do where it is not read.
        block: of FP8, rows and columns that share a scale; None: one for all, or one for each row.
        bits: of a packed integer.
        group: of packed integers, columns that share a scale; None: a whole row, or all.
        zero_points: whether packed integers have zero points.
    """

    words: str
    kind: str | None = None
    needs: str = _PLAIN_COPY
    block: tuple[int, int] | None = None
    bits: int = 8
    group: int | None = None
    zero_points: bool = False


def published_format(config: Mapping[str, Any]) -> PublishedFormat | None:
    """The format that a config.json names, None for plain weights.

    RainError if its fields have values that no such format has.
    """
    section = section_of(config)
    if section is None:
        return None
    by_bits = [name for name in ("load_in_8bit", "load_in_4bit") if section.get(name)]
    # The first models of bitsandbytes name no method.
    method = str(section.get("quant_method", BITSANDBYTES if by_bits else "unknown"))
    if method == "fp8":
        return _fp8(_block(section.get("weight_block_size"), "weight_block_size"))
    if method == "mxfp4":
        return PublishedFormat("MXFP4", MXFP4)
    if method == "compressed-tensors":
        return _compressed_tensors(section)
    if method == BITSANDBYTES:
        known = None if config.get("model_type") in _TRANSPOSED else BITSANDBYTES
        bits = 8 if "load_in_8bit" in by_bits else 4
        return PublishedFormat(f"bitsandbytes with {bits} bits", known)
    return PublishedFormat(_NAMES.get(method, method))


def _fp8(block: tuple[int, int] | None, maker: str = "") -> PublishedFormat:
    scales = "a scale for each tensor or row"
    if block is not None:
        scales = f"scales of blocks of {block[0]} x {block[1]}"
    return PublishedFormat(f"{maker}FP8 with {scales}", FP8, block=block)


def _compressed_tensors(section: Mapping[str, Any]) -> PublishedFormat:
    kind = str(section.get("format"))
    words = f"compressed-tensors {kind}"
    groups = section.get("config_groups")
    parts = groups.values() if isinstance(groups, Mapping) else ()
    found = [part.get("weights") for part in parts if isinstance(part, Mapping)]
    schemes = [one for one in found if isinstance(one, Mapping)]
    if kind not in ("float-quantized", "pack-quantized") or not schemes:
        return PublishedFormat(words)
    if any(_scheme(one) != _scheme(schemes[0]) for one in schemes):
        return PublishedFormat(f"{words}, with several kinds of weights")
    scheme = schemes[0]
    if kind == "float-quantized" and (scheme.get("type"), scheme.get("num_bits")) == ("float", 8):
        by_block = scheme.get("strategy") == "block"
        block = _block(scheme.get("block_structure"), "block_structure") if by_block else None
        return _fp8(block, "compressed-tensors ")
    if kind == "pack-quantized" and scheme.get("type") == "int" and scheme.get("num_bits") in _BITS:
        return _packed(scheme)
    return PublishedFormat(f"{words} of {shown(scheme.get('num_bits'))} bits")


def _scheme(weights: Mapping[str, Any]) -> tuple[Any, ...]:
    names = ("type", "num_bits", "strategy", "group_size", "block_structure", "symmetric")
    return tuple(weights.get(name) for name in names)


def _packed(scheme: Mapping[str, Any]) -> PublishedFormat:
    bits, group = int(scheme["num_bits"]), None
    if scheme.get("strategy") == "group":
        group = scheme.get("group_size")
        if not _is_count(group):
            raise _unusable("group_size", group, "a whole number above 0")
    zero_points = scheme.get("symmetric") is False
    words = f"compressed-tensors INT{bits}"
    return PublishedFormat(words, PACKED, bits=bits, group=group, zero_points=zero_points)


def _block(value: object, field: str) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(map(_is_count, value)):
        return value[0], value[1]
    raise _unusable(field, value, "two whole numbers above 0")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _unusable(field: str, value: object, expected: str) -> RainError:
    return RainError(
        f"config.json: quantization_config: {field} is {shown(value)}, expected {expected}; take "
        "the file as the model's publisher has it"
    )


def quantised_remark(reference: ModelReference, folder: str) -> str | None:
    """What to do about a model whose weights are quantised; None where they are plain.

    folder: where its files are. A config.json that names a format beside plain weights counts for
    nothing. RainError if the weights cannot be read, or the format's fields are none.
    """
    found = stored_format(reference, folder)
    if found is None:
        return None
    if found.kind is None:
        return f"{reference} is published in {found.words}, which is not read here: {found.needs}"
    name, goal = command_line(reference)
    return (
        f"{reference} is published in {found.words}, and mergekit-yaml reads plain weights: merge "
        "with `mergekit-rain merge`, which dequantises tensor by tensor; or run "
        f"`mergekit-rain dequantize {name} {goal}`, and name {goal} in its place"
    )


def stored_format(reference: ModelReference, folder: str) -> PublishedFormat | None:
    """The format in which the weights in the folder are quantised; None where they are plain.

    RainError if the weights cannot be read, or the format's fields are none.
    """
    try:
        config = read_config_file(folder)
    except RainError:
        return None  # transformers says what is wrong, or finds it elsewhere
    found = format_of(config, reference)
    return found if found is not None and _has_codes(folder, reference) else None


def format_of(config: Mapping[str, Any], who: object) -> PublishedFormat | None:
    """As `published_format`, with the model's name in the error."""
    try:
        return published_format(config)
    except RainError as error:
        raise RainError(f"{who}: {error}") from None


def _has_codes(folder: str, reference: ModelReference) -> bool:
    index = open_index(folder, reference)
    stored = {kind for kind, shape in header_entries(index, index.tensor_paths).values() if shape}
    return not stored <= {*PLAIN_TYPES, "I64", "BOOL"}


def command_line(reference: ModelReference) -> tuple[str, str]:
    """The model and the folder for its plain weights, as a shell takes them.

    Beside a local folder, or in the present one for a model on the hub.
    """
    path, revision = str(reference.model.path), reference.model.revision
    local = os.path.exists(path)
    goal = f"{path.rstrip('/')}-bf16" if local else f"./{path.rpartition('/')[2]}-bf16"
    name = path if local or revision is None else f"{path}@{revision}"
    return shlex.quote(name), shlex.quote(goal)
