"""A model on the hub seen before its weights are downloaded: small files, and headers of shards.

The copy is a folder like the model's own, in which the shards are holes behind their headers: all
that asks for names, shapes and sizes can be asked of it, and it takes no room.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from mergekit.common import ModelReference

from rain_mergekit.errors import RainError
from rain_mergekit.models.checkpoint import refuse_pickles
from rain_mergekit.models.folder_check import require_no_adapter
from rain_mergekit.models.side_files import HUB_CODE, HUB_PATTERNS
from rain_mergekit.models.source import named
from rain_mergekit.system.untrusted_input import read_regular

_SMALL = ("*.json", *HUB_PATTERNS)
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Preview:
    """A folder to look at, the commit it is of (None: a local folder), and what is not here yet.

    missing: bytes of weights that a download will fetch. Never take a value from these weights.
    """

    folder: str
    commit: str | None
    missing: int


def preview(
    reference: ModelReference, place: Path, cache_dir: str | None, *, trust: bool
) -> Preview:
    """What can be known of the model without its weights; a local folder is taken as it is.

    place: an empty folder for the copy. Raises RainError if there is no such model, or it has no
    safetensors, or its index is broken.
    """
    path = reference.model.path
    if os.path.exists(path):
        return Preview(path, None, 0)
    patterns = [*_SMALL, *(HUB_CODE if trust else ())]
    with named(f"{reference}: model not found", path):
        folder = Path(
            snapshot_download(
                path,
                revision=reference.model.revision,
                cache_dir=cache_dir,
                allow_patterns=patterns,
            )
        )
        missing = sum(
            _shard(folder, name, place, path) for name in _shards(folder, reference, path)
        )
    for file in folder.rglob("*"):
        goal = place / file.relative_to(folder)
        if file.is_file() and not goal.exists():
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, goal)
    return Preview(str(place), folder.name, missing)


def _shards(folder: Path, reference: ModelReference, repository: str) -> list[str]:
    """The names of the files with weights; the index is somebody else's text."""
    if (folder / _INDEX).is_file():
        try:
            index = json.loads(read_regular(folder / _INDEX))
            names = sorted({str(name) for name in index["weight_map"].values()})
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise RainError(
                f"{reference}: cannot read the checkpoint: {_INDEX} is broken"
            ) from None
        if all(Path(name).name == name for name in names):
            return names
        raise RainError(f"{reference}: cannot read the checkpoint: {_INDEX} names other folders")
    if (folder / _WHOLE).is_file() or HfApi().file_exists(repository, _WHOLE, revision=folder.name):
        return [_WHOLE]
    require_no_adapter(str(folder), reference)
    return refuse_pickles(reference)


def _shard(folder: Path, name: str, place: Path, repository: str) -> int:
    """Put the shard into `place`, a link to what is here or a hole; returns the bytes not here."""
    here, goal = folder / name, place / name
    if here.is_file():
        goal.symlink_to(here.resolve())
        return 0
    found = HfApi().parse_safetensors_file_metadata(repository, name, revision=folder.name)
    return _write_header(goal, found)


def _write_header(path: Path, found: Any) -> int:
    """The file as large as the real one, with a hole for the numbers."""
    entries = {
        name: {"dtype": one.dtype, "shape": one.shape, "data_offsets": list(one.data_offsets)}
        for name, one in found.tensors.items()
    }
    header = json.dumps(entries).encode()
    end = max((int(one.data_offsets[1]) for one in found.tensors.values()), default=0)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(_LENGTH_BYTES, "little") + header)
        file.truncate(_LENGTH_BYTES + len(header) + end)
    return end
