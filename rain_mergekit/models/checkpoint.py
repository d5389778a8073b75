"""Read-only access to a model's checkpoint, through mergekit's own references and loaders."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rain_mergekit.errors import RainError
from rain_mergekit.models.folder_check import require_model_files
from rain_mergekit.models.source import model_folder
from rain_mergekit.system.untrusted_input import first_line

# Errors of reading malformed JSON or a broken shard.
_BROKEN = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError),
    *(SafetensorError, pickle.UnpicklingError),
)
# Other types are quantised: their codes need scales from other tensors.
PLAIN_TYPES = ("F64", "F32", "F16", "BF16")


class Checkpoint:
    """The tensors of one model; nothing is read before it is asked for.

    plain: whether `get` gives the numbers as they are stored.
    """

    plain = True

    def __init__(
        self,
        reference: ModelReference,
        path: str,
        index: ShardedTensorIndex,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.reference, self.path = reference, path
        self.trust_remote_code = trust_remote_code
        self.names = frozenset(index.tensor_paths)
        self._loader = LazyTensorLoader(index, lazy_unpickle=False)

    @classmethod
    def open(
        cls,
        reference: ModelReference,
        path: str | None = None,
        *,
        trust_remote_code: bool = False,
    ) -> Checkpoint:
        """Fetch the model if it is not here and read its index; RainError says what is wrong.

        path: the folder with its files, None where the reference itself says it.
        """
        folder = path or model_folder(reference, None, trust=trust_remote_code)
        index = open_index(folder, reference)
        return cls(reference, folder, index, trust_remote_code=trust_remote_code)

    @property
    def revision(self) -> str | None:
        """The commit that a hub reference resolved to (by its cache path), else as asked."""
        folder = Path(self.path)
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return folder.name
        revision: str | None = self.reference.model.revision
        return revision

    @property
    def index(self) -> ShardedTensorIndex:
        """Which tensor lies in which shard."""
        return self._loader.index

    @property
    def bytes(self) -> int:
        """Size of all shards on disk."""
        shards = {shard.filename for shard in self.index.shards}
        return sum(os.path.getsize(os.path.join(self.path, shard)) for shard in shards)

    def shapes(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Shapes of those of the named tensors that exist, from the file headers alone."""
        return header_shapes(self.index, names)

    def types(self, names: Iterable[str]) -> dict[str, str]:
        """How those of the named tensors that exist are stored, in safetensors' words (`BF16`)."""
        return {name: stored for name, (stored, _) in header_entries(self.index, names).items()}

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of those of the named tensors that exist, as they are stored."""
        entries = header_entries(self.index, names)
        return {name: prod(shape) * _bits(stored) // 8 for name, (stored, shape) in entries.items()}

    def get(self, name: str) -> Tensor:
        """Read one tensor to the CPU; RainError names the model if it is missing or broken."""
        try:
            tensor: Tensor = self._loader.get_tensor(name)
        except KeyError:
            raise RainError(f"{self.reference}: tensor {name} is not in the checkpoint") from None
        except (OSError, SafetensorError, RuntimeError) as error:
            raise RainError(f"{self.reference}: cannot read tensor {name}: {error}") from None
        return tensor

    def part(self, name: str, index: int) -> Tensor:
        """Matrix `index` of a tensor of several; the others are not read."""
        return self.get(name)[index]

    def twin(self) -> Checkpoint:
        """The same tensors through files that are opened anew, for another thread."""
        other = copy(self)
        other._loader = LazyTensorLoader(self.index, lazy_unpickle=False)  # noqa: SLF001
        return other

    def release(self) -> None:
        """Close the open shard, so that its mapped memory can be freed."""
        self._loader.flush()


def _bits(stored: str) -> int:
    """Of one number, from safetensors' word for its type: `F8_E4M3`, `BF16`, `BOOL`."""
    width = re.search(r"\d+", stored)
    return int(width[0]) if width else 8


def open_index(path: str, reference: ModelReference) -> ShardedTensorIndex:
    """Which tensor lies in which shard; RainError unless all shards are there and readable."""
    require_model_files(path, reference)
    try:
        index = ShardedTensorIndex.from_disk(path)
        if not all(isinstance(shard.filename, str) for shard in index.shards):
            raise TypeError("its index names something other than files")
    except _BROKEN as error:
        _require_permission(reference, [Path(path), *Path(path).glob("*.safetensors")])
        raise RainError(f"{reference}: cannot read the checkpoint: {first_line(error)}") from None
    if not index.is_safetensors:
        refuse_pickles(reference)
    outside = sorted({s.filename for s in index.shards if _leaves_folder(s.filename)})
    if outside:
        raise RainError(
            f"{reference}: its index names files outside of its folder: {', '.join(outside)}; "
            "fetch the model again from where you trust it"
        )
    missing = sorted(
        {shard.filename for shard in index.shards if not _exists(path, shard.filename)}
    )
    if missing:
        raise RainError(
            f"{reference}: shard(s) named by the index are missing: {', '.join(missing)}"
        )
    _require_permission(reference, [Path(path, shard.filename) for shard in index.shards])
    return index


def refuse_pickles(reference: ModelReference | str) -> NoReturn:
    """RainError for a model that has its weights in pickle files alone."""
    raise RainError(
        f"{reference}: only safetensors checkpoints are read (pickle files can run code); "
        "convert the model with `model.save_pretrained(..., safe_serialization=True)`"
    )


def _require_permission(reference: ModelReference, paths: Iterable[Path]) -> None:
    """Report unreadable shards as a permission problem; the loaders report them as missing."""
    closed = [str(path) for path in paths if path.exists() and not os.access(path, os.R_OK)]
    if closed:
        raise RainError(
            f"{reference}: cannot read the checkpoint: permission denied for {', '.join(closed)}"
        )


def _leaves_folder(filename: str) -> bool:
    return os.path.isabs(filename) or ".." in Path(filename).parts


def _exists(path: str, filename: str) -> bool:
    return os.path.exists(os.path.join(path, filename))


@contextmanager
def open_shard(folder: str, filename: str) -> Iterator[Any]:
    """One shard, opened by safetensors; RainError if it cannot be read."""
    path = os.path.join(folder, str(filename))
    if os.path.exists(path) and not os.path.isfile(path):
        raise RainError(f"{path}: cannot read the checkpoint: not a regular file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise RainError(
            f"{path}: cannot read the checkpoint: {first_line(error)}; fetch the file again"
        ) from None


def header_shapes(index: ShardedTensorIndex, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of the named tensors from the safetensors headers, each shard opened once."""
    return {name: shape for name, (_, shape) in header_entries(index, names).items()}


def header_entries(
    index: ShardedTensorIndex, names: Iterable[str]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of the named tensors, in the same way.

    Of those that are really there: an index may name more, by mistake or after a conversion.
    """
    wanted = set(names)
    entries: dict[str, tuple[str, tuple[int, ...]]] = {}
    for shard in index.shards:
        keys = wanted.intersection(shard.contained_keys)
        if keys:
            with open_shard(index.base_path, shard.filename) as file:
                views = {key: file.get_slice(key) for key in keys.intersection(file.keys())}
                entries |= {k: (v.get_dtype(), tuple(v.get_shape())) for k, v in views.items()}
    return entries
