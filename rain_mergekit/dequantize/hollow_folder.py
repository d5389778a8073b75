"""A quantised model as mergekit is shown it in a merge: names and shapes of the plain model.

The folder holds the small files, and a weight file that is a hole behind its header. Tensors come
from the quantised model itself, one at a time, through the loader that mergekit asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import LoaderCache
from torch import Tensor

from rain_mergekit.calibration_file.container import Entry, write_header
from rain_mergekit.dequantize.plain_view import PlainView
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.config_file import (
    published_config,
    read_config_file,
    without_quantisation,
    write_config_file,
)
from rain_mergekit.models.side_files import copy_files, side_files
from rain_mergekit.models.source import PUBLISHED


class PlainLoader(LazyTensorLoader):  # type: ignore[misc] # mergekit publishes no types
    """What mergekit reads a model through; it dequantises each tensor that is asked for."""

    def __init__(self, index: ShardedTensorIndex, view: PlainView) -> None:
        """index: of the hollow folder."""
        super().__init__(index, lazy_unpickle=False)
        self._view = view

    def get_tensor(
        self,
        key: str,
        device: str = "cpu",
        aliases: list[str] | None = None,
        raise_on_missing: bool = True,
    ) -> Tensor | None:
        """One tensor, plain; a KeyError, or None, where it is not there."""
        names = [key, *(aliases or ())]
        name = next((one for one in names if one in self.index.tensor_paths), None)
        if name is None:
            if raise_on_missing:
                raise KeyError(key)
            return None
        with self.lock:
            return self._view.get(name).to(device)

    def flush(self) -> None:
        """Close the open shard."""
        with self.lock:
            self._view.release()


@contextmanager
def shown_to_mergekit(checkpoints: Iterable[Checkpoint]) -> Iterator[dict[ModelReference, str]]:
    """Inside the block mergekit can merge those of the models that are quantised.

    Gives the folder by which each is to be named there.
    """
    views = {one.reference: one for one in checkpoints if isinstance(one, PlainView)}
    with TemporaryDirectory(prefix="rain-plain-") as place:
        folders = {ref: Path(place, str(n)) for n, ref in enumerate(views)}
        names = {ref: ModelReference.parse(str(folder)) for ref, folder in folders.items()}
        for reference, view in views.items():
            write_hollow(view, folders[reference])
            index = ShardedTensorIndex.from_disk(str(folders[reference]))
            LoaderCache.loaders[names[reference]] = PlainLoader(index, view)
        try:
            yield {reference: str(folder) for reference, folder in folders.items()}
        finally:
            for name in names.values():
                LoaderCache.loaders.pop(name, None)


def write_hollow(view: PlainView, folder: Path) -> None:
    """Everything beside the numbers, and a link to where these are."""
    folder.mkdir()
    copy_files(view.path, folder, side_files(view.path))
    config = without_quantisation(read_config_file(view.path))
    write_config_file(folder, published_config(config, dtype="bfloat16", vocabulary=None))
    (folder / PUBLISHED).symlink_to(Path(view.path).resolve())
    entries, position = dict[str, Entry](), 0
    for recipe in sorted(view.made_of.values(), key=lambda one: -one.dtype.itemsize):
        entries[recipe.name] = Entry(recipe.dtype, recipe.shape, position, recipe.bytes)
        position += recipe.bytes
    header = write_header({"format": "pt"}, entries)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + position)
