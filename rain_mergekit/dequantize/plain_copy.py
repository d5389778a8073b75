"""A plain copy of a quantised model: weights, config.json, and the files beside them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rain_mergekit import __version__
from rain_mergekit.dequantize.checkpoint_writer import write_weights
from rain_mergekit.dequantize.recipes import Recipe, recipes
from rain_mergekit.errors import RainError
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.config_file import (
    published_config,
    read_config_file,
    without_quantisation,
    write_config_file,
)
from rain_mergekit.models.published_format import PublishedFormat, format_of
from rain_mergekit.models.side_files import copy_files, model_card, side_files

_GIB = 1024**3


@dataclass(frozen=True)
class PlainCopy:
    """What will be written, known before any work.

    Attributes:
        checkpoint: the quantised model.
        format: in which it is stored.
        recipes: of all tensors of the copy.
    """

    checkpoint: Checkpoint
    format: PublishedFormat
    recipes: list[Recipe]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> PlainCopy:
        """From config.json and headers; RainError for weights that are plain or cannot be read."""
        who = checkpoint.reference
        found = format_of(read_config_file(checkpoint.path), who)
        if found is None:
            raise RainError(
                f"{who}: its config.json names no quantisation: nothing is to be dequantised; "
                "merge it as it is"
            )
        if found.kind is None:
            raise RainError(
                f"{who}: is published in {found.words}, which is not read here: {found.needs}"
            )
        return cls(checkpoint, found, recipes(checkpoint, found))

    @property
    def bytes(self) -> int:
        """What the weights of the copy take."""
        return sum(recipe.bytes for recipe in self.recipes)

    @property
    def dequantised(self) -> int:
        """How many tensors are not copied."""
        return sum(recipe.formula is not None for recipe in self.recipes)

    def write(self, folder: Path, progress: Callable[[int], object] = lambda _bytes: None) -> int:
        """Fill an empty folder; returns the number of weight files.

        progress: told of the bytes that have been written. RainError if there is no room, or a
        tensor cannot be read or is not finite; OSError if the folder cannot be written.
        """
        self._require_room(folder)
        source = self.checkpoint.path
        metadata = {"format": "pt", "dequantized_from": self.format.words}
        files = write_weights(folder, self.recipes, self.checkpoint.get, metadata, progress)
        self.checkpoint.release()
        copy_files(source, folder, side_files(source))
        config = without_quantisation(read_config_file(source))
        write_config_file(folder, published_config(config, dtype="bfloat16", vocabulary=None))
        self._write_card(folder)
        return files

    def _require_room(self, folder: Path) -> None:
        free = shutil.disk_usage(folder).free
        if free < self.bytes:
            raise RainError(
                f"the weights of {self.checkpoint.reference} take {self.bytes / _GIB:,.1f} GiB in "
                f"bfloat16, and {free / _GIB:,.1f} are free there; name an output folder on "
                "another disk"
            )

    def _write_card(self, folder: Path) -> None:
        """The publisher's card, and what these weights are."""
        card = model_card(self.checkpoint.path)
        text = b"" if card is None else card.rstrip() + b"\n\n"
        note = (
            f"The weights in this folder were dequantised from {self.format.words} to bfloat16 by "
            f"`mergekit-rain dequantize` {__version__}; those that were not quantised are as "
            "published.\n"
        )
        (folder / "README.md").write_bytes(text + note.encode())
