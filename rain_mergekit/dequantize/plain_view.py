"""A quantised checkpoint read as if it were plain: one tensor at a time, when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rain_mergekit.calibration_file.container import NAMES
from rain_mergekit.dequantize.recipes import Recipe, recipes
from rain_mergekit.errors import RainError
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.loading import LoadOptions, open_checkpoint
from rain_mergekit.models.published_format import stored_format

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.io.lazy_tensor_loader import ShardedTensorIndex


class PlainView(Checkpoint):
    """The tensors of the plain model, by its names; nothing is written.

    Of the last tensor of experts the result is kept, for readers that want one after the other.
    """

    plain = False

    def __init__(
        self,
        reference: ModelReference,
        path: str,
        index: ShardedTensorIndex,
        made_of: Mapping[str, Recipe],
        words: str,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        """made_of: how each plain tensor is made, by its name; words: the format in messages."""
        super().__init__(reference, path, index, trust_remote_code=trust_remote_code)
        self.made_of, self.words = made_of, words
        self.names = frozenset(made_of)
        self._last: tuple[str, Tensor] | None = None

    @property
    def bytes(self) -> int:
        """Size of all tensors once they are plain."""
        return sum(recipe.bytes for recipe in self.made_of.values())

    def shapes(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Shapes of those of the named tensors that exist."""
        return {name: self.made_of[name].shape for name in names if name in self.made_of}

    def types(self, names: Iterable[str]) -> dict[str, str]:
        """How those of the named tensors that exist would be stored."""
        return {name: NAMES[self.made_of[name].dtype] for name in names if name in self.made_of}

    def get(self, name: str) -> Tensor:
        """Read and dequantise one tensor; RainError names the model if it is missing or broken."""
        recipe = self.made_of.get(name)
        if recipe is None:
            raise RainError(f"{self.reference}: tensor {name} is not in the checkpoint")
        if self._last is not None and self._last[0] == name:
            return self._last[1]
        if recipe.formula is None or len(recipe.shape) < 3:
            return next(recipe.pieces(super().get))
        found = torch.empty(recipe.shape, dtype=recipe.dtype, device="cpu")
        for number, piece in enumerate(recipe.pieces(super().get)):
            found[number] = piece
        self._last = name, found
        return found

    def part(self, name: str, index: int) -> Tensor:
        """Read and dequantise the tensor's matrix `index` alone."""
        recipe, read = self.made_of[name], super().get
        return recipe.piece([read(part) for part in recipe.parts], index)

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of those of the named tensors that exist, once they are plain."""
        return {name: self.made_of[name].bytes for name in names if name in self.made_of}

    def twin(self) -> PlainView:
        """The same tensors through files that are opened anew, for another thread."""
        other = super().twin()
        assert isinstance(other, PlainView)  # noqa: S101 - a copy of this one
        other._last = None  # noqa: SLF001 - of this class
        return other

    def release(self) -> None:
        """Close the open shard and free the last tensor."""
        self._last = None
        super().release()


def open_plain(name: str, options: LoadOptions) -> Checkpoint:
    """The model of that reference or folder, read as if it were plain; RainError as below."""
    return plain_view(open_checkpoint(name, options))


def plain_view(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself where its weights are plain, else a view of it that dequantises.

    RainError for a format that is not read here, or a checkpoint that does not fit its format.
    """
    found = stored_format(checkpoint.reference, checkpoint.path) if checkpoint.plain else None
    if found is None:
        return checkpoint
    if found.kind is None:
        raise RainError(
            f"{checkpoint.reference} is published in {found.words}, which is not read here: "
            f"{found.needs}"
        )
    made_of = {recipe.name: recipe for recipe in recipes(checkpoint, found)}
    checkpoint.release()
    return PlainView(
        checkpoint.reference,
        checkpoint.path,
        checkpoint.index,
        made_of,
        found.words,
        trust_remote_code=checkpoint.trust_remote_code,
    )
