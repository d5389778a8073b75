"""The weight files of a merged model, which mergekit writes as safetensors or as pickles."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rain_mergekit.errors import RainError

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_UNFINISHED = ".rain-unfinished"
_PATTERN = re.compile(
    r"(?P<base>model|pytorch_model)(-\d{5}-of-\d{5})?\.(?P<suffix>safetensors|bin)"
)


class Weights(Protocol):
    """The tensors of one file; safetensors are read when asked for, pickles are mapped."""

    @property
    def names(self) -> list[str]:
        """The names of all tensors in the file."""

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, without reading it."""


@dataclass(frozen=True)
class _Safetensors:
    file: Any

    @property
    def names(self) -> list[str]:
        return list(self.file.keys())

    def get(self, name: str) -> Tensor:
        tensor: Tensor = self.file.get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.file.get_slice(name).get_shape())


@dataclass(frozen=True)
class _Pickled:
    tensors: Mapping[str, Tensor]

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    def get(self, name: str) -> Tensor:
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)


def weight_files(folder: Path) -> list[Path]:
    """The files with weights, in order."""
    return sorted(path for path in folder.iterdir() if _PATTERN.fullmatch(path.name))


@contextmanager
def open_weights(path: Path) -> Iterator[Weights]:
    """Open one weight file of either format."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            yield _Safetensors(file)
    else:
        yield _Pickled(torch.load(path, map_location="cpu", weights_only=True, mmap=True))


def tensor_names(folder: Path) -> set[str]:
    """The names of all tensors in the folder's weight files."""
    names: set[str] = set()
    for path in weight_files(folder):
        with open_weights(path) as weights:
            names.update(weights.names)
    return names


def shapes_of(folder: Path, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of those of the named tensors that are there."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        with open_weights(path) as weights:
            shapes.update({n: weights.shape(n) for n in weights.names if n in names})
    return shapes


def add_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors into one more file of the format that is there.

    The files get new names, as their number is part of them, and the index lists them all.
    """
    shards = weight_files(folder)
    base, suffix = _form(shards)
    count = len(shards) + 1
    for number, shard in enumerate(shards, start=1):
        shard.rename(folder / f"{base}-{number:05d}-of-{count:05d}.{suffix}")
    replace_weights(folder / f"{base}-{count:05d}-of-{count:05d}.{suffix}", tensors)
    write_index(folder)


def replace_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file atomically: its name always refers to a whole file, old or new."""
    unfinished = path.with_name(f"{_UNFINISHED}{path.suffix}")
    _save(unfinished, tensors)
    unfinished.replace(path)


def write_index(folder: Path) -> None:
    """The index of several files; a single one needs none."""
    shards = weight_files(folder)
    base, suffix = _form(shards)
    path = folder / f"{base}.{suffix}.index.json"
    if len(shards) == 1 and not path.exists():
        return
    places: dict[str, str] = {}
    for shard in shards:
        with open_weights(shard) as weights:
            places.update(dict.fromkeys(weights.names, shard.name))
    total = sum(shard.stat().st_size for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _form(shards: Sequence[Path]) -> tuple[str, str]:
    """Prefix and suffix of the files' names."""
    form = _PATTERN.fullmatch(shards[0].name) if shards else None
    if form is None:
        raise RainError("the merged model's folder holds no weights")
    return form["base"], form["suffix"]


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file(dict(tensors), path, metadata={"format": "pt"})
    else:
        torch.save(dict(tensors), path)
