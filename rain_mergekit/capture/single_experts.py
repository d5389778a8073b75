"""Experts that would take much memory together are read one by one, when tokens reach them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from rain_mergekit.errors import RainError
from rain_mergekit.linalg.finite import finite
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.experts import beyond_budget, has_budget, read_one_by_one
from rain_mergekit.models.model_tensors import ModelTensors
from rain_mergekit.system.profile import LOAD, moved, phase

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class SingleExperts:
    """Reads single experts of one model.

    names: of the 3-D weights of experts in the model. dtype: of the forward pass. known: of each
    layer, what `of` says. seen: experts that hold nothing but numbers; each is looked at once.
    refused: layers whose experts would be read so and cannot.
    """

    tensors: ModelTensors
    names: Collection[str]
    device: torch.device
    dtype: torch.dtype
    known: dict[str, frozenset[str]] = field(default_factory=dict)
    seen: set[tuple[str, int]] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)

    def of(self, prefix: str) -> frozenset[str]:
        """The weights of a layer that are read so, by their names in the model.

        All of a layer's or none: where they take more than the budget as they are stored, and each
        expert can be read alone.
        """
        if prefix not in self.known:
            self.known[prefix] = self._of(prefix)
        return self.known[prefix]

    def _of(self, prefix: str) -> frozenset[str]:
        if not has_budget():  # else the headers of the files would be opened for every layer
            return frozenset()
        mine = [name for name in self.names if name.startswith(f"{prefix}.")]
        if not beyond_budget(sum(map(self.tensors.stored_bytes, mine))):
            return frozenset()
        if all(map(self.tensors.has_single_experts, mine)):
            return frozenset(mine)
        if not self.refused:  # said once
            LOG.warning(
                "%s: its experts cannot be read one by one (--experts-budget): transformers turns "
                "those of a layer as a whole",
                self.tensors.checkpoint.reference,
            )
        self.refused.add(prefix)
        return frozenset()

    @contextmanager
    def read(self, layer: nn.Module, prefix: str) -> Iterator[None]:
        """Inside the block the layer's experts are read when they are used."""
        homes = {name.rpartition(".")[0] for name in self.of(prefix)}
        readers = {
            layer.get_submodule(home.removeprefix(f"{prefix}.")): partial(self._expert, home)
            for home in homes
        }
        with read_one_by_one(readers):
            yield

    def _expert(self, home: str, weight: str, expert: int) -> Tensor:
        name = f"{home}.{weight}"
        with phase(LOAD):
            stored = self.tensors.expert(name, expert)
            moved(LOAD, stored.nbytes)
            found = stored.to(self.device)
        if (name, expert) not in self.seen:
            words = f"{name}, expert {expert},"
            numbers(self.tensors.checkpoint, words, found.to(self.dtype))
            self.seen.add((name, expert))
        return found


def fitting(checkpoint: Checkpoint, name: str, tensor: Tensor, expected: tuple[int, ...]) -> Tensor:
    """The tensor, if it has the shape that the model wants."""
    if tensor.shape == expected:
        return tensor
    raise RainError(
        f"{checkpoint.reference}: tensor {name} has shape {tuple(tensor.shape)}, "
        f"but config.json asks for {tuple(expected)}"
    )


def numbers(checkpoint: Checkpoint, name: str, tensor: Tensor) -> Tensor:
    """The tensor, if it holds nothing but numbers in the type of the forward pass."""
    if finite(tensor):
        return tensor
    raise RainError(
        f"{checkpoint.reference}: tensor {name} contains NaN or Inf in {tensor.dtype}: "
        "the checkpoint is damaged, fetch it again (or the type is too narrow: see --dtype)"
    )
