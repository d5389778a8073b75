"""The safetensors container, read with bounds checks, by key, and without mapping the file.

A memory-mapped file that shrinks kills the process, whereas a short read is an error that can be
reported. Stock safetensors reads and writes the same files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from rain_mergekit.errors import RainError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # the limit of the safetensors library
MAX_DIMENSIONS = 8
LENGTH_BYTES = 8


@dataclass(frozen=True)
class Entry:
    """One tensor: its type, its shape, and where its bytes are in the data section."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


def read_header(file: BinaryIO, size: int) -> tuple[dict[str, Any], dict[str, Entry], int]:
    """Return metadata, entries and the offset of the data section of a file of `size` bytes.

    Raises RainError when the file is not a whole safetensors file; reads nothing but the header.
    """
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, MAX_HEADER):
        raise RainError("not a safetensors file, or cut off inside its header")
    document = parse_json(file.read(length), "the safetensors header")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise RainError("the safetensors metadata is not an object")
    entries = {key: _entry(key, value) for key, value in document.items()}
    _require_contiguous(entries, size - LENGTH_BYTES - length)
    return metadata, entries, LENGTH_BYTES + length


def _entry(key: str, value: Any) -> Entry:
    fields: dict[str, Any] = value if isinstance(value, dict) else {}
    dtype = fields.get("dtype")
    shape, offsets = _naturals(fields.get("shape")), _naturals(fields.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise RainError(f"tensor {key!r}: type {dtype!r:.40} is not one of {', '.join(DTYPES)}")
    if shape is None or offsets is None or len(offsets) != 2:
        raise RainError(f"tensor {key!r}: its shape or offsets are not lists of whole numbers")
    if len(shape) > MAX_DIMENSIONS:
        raise RainError(f"tensor {key!r}: more than {MAX_DIMENSIONS} dimensions")
    size = offsets[1] - offsets[0]
    if size != math.prod(shape) * DTYPES[dtype].itemsize:
        raise RainError(f"tensor {key!r}: its shape does not need the bytes that it is given")
    return Entry(DTYPES[dtype], tuple(shape), offsets[0], size)


def _naturals(value: object) -> list[int] | None:
    if isinstance(value, list) and all(type(item) is int and item >= 0 for item in value):
        return value
    return None


def _require_contiguous(entries: Mapping[str, Entry], available: int) -> None:
    """Tensors follow each other without gap or overlap and end where the file ends."""
    position = 0
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != position:
            raise RainError(f"tensor {key!r} does not start where the tensor before it ends")
        position += entry.size
    if position != available:
        what = "truncated" if position > available else "followed by bytes that belong to nothing"
        raise RainError(f"{what}: {position} bytes of tensors expected, {available} found")


def write_header(metadata: Mapping[str, str], entries: Mapping[str, Entry]) -> bytes:
    """The bytes before the data section, padded so that the data is aligned."""
    document: dict[str, Any] = {"__metadata__": dict(metadata)}
    for key, entry in entries.items():
        offsets = [entry.start, entry.start + entry.size]
        fields = {"dtype": NAMES[entry.dtype], "shape": entry.shape, "data_offsets": offsets}
        document[key] = fields
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    if len(text) > MAX_HEADER:
        raise RainError(f"the header needs {len(text)} bytes, more than safetensors allows")
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def read_tensor(file: BinaryIO, data_start: int, entry: Entry) -> tuple[Tensor, str]:
    """Read one tensor to the CPU; return it with the SHA-256 of its bytes."""
    buffer = bytearray(entry.size)
    file.seek(data_start + entry.start)
    if file.readinto(buffer) != entry.size:  # type: ignore[attr-defined]
        raise RainError("the file became shorter while it was in use")
    digest = hashlib.sha256(buffer).hexdigest()
    if not buffer:
        return torch.empty(entry.shape, dtype=entry.dtype, device="cpu"), digest
    return torch.frombuffer(buffer, dtype=entry.dtype).reshape(entry.shape), digest


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements in row-major order, as the container stores them."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def parse_json(data: bytes | str, what: str) -> dict[str, Any]:
    """Parse an object strictly: no duplicate keys, no NaN or infinite numbers, bounded depth."""
    try:
        document = json.loads(
            data if isinstance(data, str) else data.decode(),
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_constant=_refuse,
        )
    except RecursionError:
        raise RainError(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise RainError(f"{what} is not valid JSON: {str(error)!r:.120}") from None
    if not isinstance(document, dict):
        raise RainError(f"{what} is not a JSON object")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")
