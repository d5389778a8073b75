"""Token-wise parts of a layer, run over a bounded number of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rain_mergekit.modules import Kind

TOKENS = 2048


class TokenChunks:
    """Keeps a long text's MLP activations (several x T x d_ff) from being there all at once.

    The size does not depend on a budget, so that a budget never changes a number. While a chunk
    runs, `start` is the index of its first token.
    """

    def __init__(self, size: int = TOKENS) -> None:
        self.start = 0
        self._size = size

    @contextmanager
    def applied(self, layer: nn.Module, names: Sequence[str]) -> Iterator[None]:
        """Inside, the named submodules of the layer go through their input in chunks."""
        modules: list[Any] = [layer.get_submodule(name) for name in names]
        for module in modules:
            module.forward = partial(self._run, module.forward)
        try:
            yield
        finally:
            for module in modules:
                del module.forward

    def _run(self, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """hidden: (1, T, d)."""
        length = hidden.shape[1]
        if length <= self._size:
            return forward(hidden)
        result = torch.empty_like(hidden)
        size = -(-length // -(-length // self._size))  # alike: a short last chunk would be slow
        try:
            for start in range(0, length, size):
                self.start, part = start, slice(start, start + size)
                result[:, part] = forward(hidden[:, part])
        finally:
            self.start = 0
        return result


def token_wise(kinds: Mapping[str, Kind]) -> tuple[str, ...]:
    """The submodules that treat each token alone: those around linear modules without heads."""
    parents = (name.rpartition(".")[0] for name, kind in kinds.items() if kind is Kind.LAYER)
    return tuple(dict.fromkeys(parent for parent in parents if parent))
