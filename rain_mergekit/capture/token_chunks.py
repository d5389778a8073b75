"""Token-wise parts of a layer, run over a bounded number of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 2048
# Names that families give to what follows the attention.
_TOKEN_WISE = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "shared_mlp", "moe")


class TokenChunks:
    """Bounds the memory of a long text's MLP activations (several x T x d_ff).

    The size does not depend on a budget, so that a budget never changes a number. While a chunk
    runs, `start` is the index of its first token and `length` the number of its tokens; else they
    are 0.
    """

    def __init__(self, size: int = TOKENS) -> None:
        self.start = self.length = 0
        self._size = size

    @contextmanager
    def applied(self, layer: nn.Module) -> Iterator[None]:
        """Inside the block, the layer's token-wise submodules process their input in chunks."""
        modules: list[Any] = [layer.get_submodule(name) for name in token_wise(layer)]
        for module in modules:
            module.forward = partial(self._run, module.forward)
        try:
            yield
        finally:
            for module in modules:
                del module.forward

    def _run(self, forward: Callable[..., Any], hidden: Tensor, *others: Any, **named: Any) -> Any:
        """Run `forward` over chunks of hidden (1, T, d); give its first output for all tokens.

        Of further outputs (router logits) those of the last chunk are given. A module that gets
        more than the hidden states (a residual) runs on all tokens at once.
        """
        length = hidden.shape[1]
        if length <= self._size or others or named:
            return forward(hidden, *others, **named)
        result, rest = torch.empty_like(hidden), None
        size = -(-length // -(-length // self._size))  # alike: a short last chunk would be slow
        try:
            for start in range(0, length, size):
                part = slice(start, start + size)
                self.start, self.length = start, hidden[:, part].shape[1]
                output = forward(hidden[:, part])
                if isinstance(output, tuple):
                    output, *rest = output
                result[:, part] = output
        finally:
            self.start = self.length = 0
        return result if rest is None else (result, *rest)


def token_wise(layer: nn.Module) -> tuple[str, ...]:
    """The submodules that treat each token alone: the layer's MLP, dense or with experts."""
    return tuple(
        name
        for name, module in layer.named_children()
        if name in _TOKEN_WISE and not any(isinstance(m, nn.Conv1d) for m in module.modules())
    )
