"""What follows a decoder's layers, run alone: from hidden states to logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rain_mergekit.capture import Shell
from rain_mergekit.errors import RainError


class _Source(nn.Module):
    """In place of a layer: gives what the last layer is to have given, whatever comes in."""

    def __init__(self, layer: nn.Module, given: list[Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)  # not a submodule: its weights are not wanted
        self._given = given

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, *_args: Any, **_kwargs: Any) -> Tensor:
        return self._given[0]


@contextmanager
def output_head(shell: Shell) -> Iterator[Callable[[Tensor], Tensor]]:
    """The model's own norm, output matrix and whatever else it does after its layers.

    Yields a function from hidden states (T, d) to logits (T, vocabulary), for any run of
    positions: nothing after the layers mixes them. Norm and output matrix are in memory
    meanwhile, in the shell's dtype.
    """
    model, given = shell.model, [torch.empty(0)]
    decoder = model.get_submodule(shell.prefix.rpartition(".")[0])
    decoder.layers = nn.ModuleList(_Source(layer, given) for layer in shell.layers)

    def logits(hidden: Tensor) -> Tensor:
        given[0] = hidden[None]
        result: Tensor = model(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return result

    empty = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_meta}
    try:
        for name, buffer in list(model.named_buffers()):
            if not buffer.is_meta:
                place, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(place), leaf, buffer.to(shell.device))
        model.load_state_dict(_stored(shell, decoder, empty), strict=False, assign=True)
        with torch.no_grad():
            yield logits
    finally:
        model.load_state_dict(empty, strict=False, assign=True)
        decoder.layers = shell.layers
        shell.checkpoint.release()


def _stored(shell: Shell, decoder: nn.Module, empty: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything but the embedding, which is read only where the output matrix is tied to it."""
    embedding = decoder.get_input_embeddings()  # type: ignore[operator]
    module = next(name for name, part in shell.model.named_modules() if part is embedding)
    table, found = f"{module}.weight", {}
    for name, tensor in empty.items():
        if name.startswith(f"{module}."):
            continue
        tied = name not in shell.checkpoint.names and tensor.shape == empty[table].shape
        stored = shell.checkpoint.get(table if tied else name)
        if stored.shape != tensor.shape:
            raise RainError(
                f"{shell.checkpoint.reference}: tensor {name} has shape {tuple(stored.shape)}, "
                f"but config.json asks for {tuple(tensor.shape)}"
            )
        found[name] = stored.to(shell.device, shell.dtype)
    return found
