"""Write a calibration file: one tensor in memory at a time, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from torch import Tensor

from rain_mergekit.calibration_file.container import (
    NAMES,
    Entry,
    parse_json,
    raw_bytes,
    write_header,
)
from rain_mergekit.calibration_file.schema import FORMAT, parse_header, version_of
from rain_mergekit.errors import RainError
from rain_mergekit.system.atomic_file import replacing

Source: TypeAlias = "Tensor | Callable[[], Tensor]"
_CHUNK = 1 << 22


def write_calibration(
    path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Source]
) -> None:
    """Write header and tensors to `path`, replacing what is there only when all is written.

    Args:
        path: the file to write.
        header: the header JSON of docs/calibration-file.md; `tensor_sha256` is filled in here.
        tensors: by key, a tensor or a function that gives one; functions are called once, in
            order, and what they return is released before the next call.

    Raises:
        RainError: the place cannot be written, or the header and the tensors do not fit together.
    """
    with replacing(path) as out, tempfile.TemporaryFile(dir=Path(path).parent) as spool:
        # The header comes first in the file and needs all digests, so the data waits in a file.
        spooled, digests = _spool(spool, tensors)
        text = _header_text({**header, "tensor_sha256": digests})
        parse_header(parse_json(text, "the header"), spooled)
        entries = _placed(spooled)
        out.write(write_header(_metadata(text, version_of(header)), entries))
        for key in entries:
            _copy(spool, spooled[key], out)


def _spool(
    spool: BinaryIO, tensors: Mapping[str, Source]
) -> tuple[dict[str, Entry], dict[str, str]]:
    entries: dict[str, Entry] = {}
    digests: dict[str, str] = {}
    for key, source in tensors.items():
        entries[key], digests[key] = _spool_one(spool, key, source)
    return entries, digests


def _spool_one(spool: BinaryIO, key: str, source: Source) -> tuple[Entry, str]:
    """Write one tensor; it is freed before the next one is made."""
    tensor = _obtain(key, source)
    if tensor.dtype not in NAMES:
        raise RainError(f"tensor {key!r}: a calibration file does not store {tensor.dtype}")
    data = raw_bytes(tensor)
    start = spool.tell()
    spool.write(data)
    return Entry(tensor.dtype, tuple(tensor.shape), start, data.nbytes), _sha256(data)


def _sha256(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _obtain(key: str, source: Source) -> Tensor:
    try:
        return source if isinstance(source, Tensor) else source()
    except OSError as error:  # its source failed, not the file that is being written
        raise RainError(f"tensor {key!r} for the calibration file: {error}") from error


def _header_text(header: Mapping[str, Any]) -> str:
    try:
        return json.dumps(header, sort_keys=True, allow_nan=False)
    except ValueError as error:
        raise RainError(f"calibration header: a value is not a finite number: {error}") from None


def _placed(spooled: Mapping[str, Entry]) -> dict[str, Entry]:
    """Where each tensor goes: wide types first, so that all are aligned; then by key."""
    order = sorted(spooled, key=lambda key: (-spooled[key].dtype.itemsize, key))
    entries, position = {}, 0
    for key in order:
        entries[key] = replace(spooled[key], start=position)
        position += spooled[key].size
    return entries


def _metadata(text: str, version: int) -> dict[str, str]:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {
        "format": FORMAT,
        "format_version": str(version),
        "header": text,
        "header_sha256": digest,
    }


def _copy(spool: BinaryIO, entry: Entry, out: BinaryIO) -> None:
    spool.seek(entry.start)
    left = entry.size
    while left:
        left -= out.write(spool.read(min(left, _CHUNK)))
