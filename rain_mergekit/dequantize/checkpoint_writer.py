"""Write a checkpoint tensor by tensor: of each no more is in memory than one matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rain_mergekit.calibration_file.container import Entry, raw_bytes, write_header
from rain_mergekit.dequantize.recipes import Read, Recipe
from rain_mergekit.errors import RainError
from rain_mergekit.linalg.finite import finite
from rain_mergekit.models.weight_files import write_index

SHARD_BYTES = 5_000_000_000


def write_weights(
    folder: Path,
    recipes: Sequence[Recipe],
    read: Read,
    metadata: dict[str, str],
    progress: Callable[[int], object] = lambda _bytes: None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write the tensors into safetensors files, with an index where there are several.

    Args:
        folder: an existing one without weights.
        recipes: of all tensors, in their order in the files.
        read: a tensor of the quantised checkpoint by its name.
        metadata: of each file.
        progress: told of the bytes that have been written.
        shard_bytes: what a file takes at most, unless a single tensor is larger.

    Returns:
        How many files there are.

    Raises:
        RainError: a dequantised tensor is not finite, or what `read` raises.
        OSError: the folder cannot be written.
    """
    shards = list(_shards(recipes, shard_bytes))
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else "model"
        _write_shard(folder / f"{name}.safetensors", shard, read, metadata, progress)
    write_index(folder)
    return len(shards)


def _shards(recipes: Sequence[Recipe], limit: int) -> Iterator[list[Recipe]]:
    shard: list[Recipe] = []
    for recipe in recipes:
        if shard and sum(one.bytes for one in shard) + recipe.bytes > limit:
            yield shard
            shard = []
        shard.append(recipe)
    yield shard


def _write_shard(
    path: Path,
    recipes: Sequence[Recipe],
    read: Read,
    metadata: dict[str, str],
    progress: Callable[[int], object],
) -> None:
    """One file; wide types come first, so that all are aligned."""
    order = sorted(recipes, key=lambda one: -one.dtype.itemsize)
    entries, position = {}, 0
    for one in order:
        entries[one.name] = Entry(one.dtype, one.shape, position, one.bytes)
        position += one.bytes
    with path.open("wb") as file:
        file.write(write_header(metadata, entries))
        for one in order:
            for piece in one.pieces(read):
                if one.formula is not None and not finite(piece):
                    raise RainError(
                        f"tensor {one.name} contains NaN or Inf once it is dequantised: the "
                        "checkpoint is damaged, fetch it again"
                    )
                file.write(raw_bytes(piece))
                progress(piece.nbytes)
                del piece  # before the next one is made
