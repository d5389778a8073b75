"""What follows the last layer: the model's own final norm and head, the latter read in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rain_mergekit.capture import Shell, Stub
from rain_mergekit.errors import RainError

# A float32 copy of this many logits takes 64 MiB, and so does a block of the head at width 4096.
_LOGITS = 2**24
_HEAD_ROWS = 4096


@contextmanager
def finishing(shell: Shell) -> Iterator[Callable[[Tensor], Tensor]]:
    """Give the map from rows (n, d) that left the last layer to next-token logits (n, vocabulary).

    The model's own code runs, with stubs for its layers that return the rows: whatever it does to
    its logits is done here too.
    """
    name, head = _head(shell.model)
    given = [_Given(layer, as_tuple=shell.as_tuple) for layer in shell.layers]
    parent = shell.model.get_submodule(name.rpartition(".")[0])
    with ExitStack() as stack:
        _fill_rest(shell, stack)
        stack.enter_context(shell.replaced(nn.ModuleList(given)))
        setattr(parent, name.rpartition(".")[2], _BlockHead(shell, name, head))
        try:
            with torch.no_grad():
                yield lambda rows: _logits(shell, given, rows)
        finally:
            setattr(parent, name.rpartition(".")[2], head)
            shell.tensors.release()


def block_rows(vocabulary: int) -> int:
    """How many rows at once keep the logits small."""
    return max(1, _LOGITS // vocabulary)


class _Given(Stub):
    """A layer that returns what it was given beforehand."""

    def __init__(self, layer: nn.Module, *, as_tuple: bool) -> None:
        super().__init__(layer, last=False, notes=[])
        self.rows = torch.empty(0)
        self._as_tuple = as_tuple

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:  # noqa: ARG002
        return (self.rows[None], None) if self._as_tuple else self.rows[None]


class _BlockHead(nn.Module):
    """The head, without ever holding it as a whole in the forward type."""

    def __init__(self, shell: Shell, name: str, head: nn.Module) -> None:
        super().__init__()
        self._read, self._dtype, self._device = shell.tensors.get, shell.dtype, shell.device
        # Some models ask for the type of their head's weight.
        self.weight = torch.empty(0, dtype=shell.dtype, device=shell.device)
        names = shell.tensors.sources
        embedding = shell.model.get_input_embeddings()
        tied = next(n for n, module in shell.model.named_modules() if module is embedding)
        self._weight = f"{name if f'{name}.weight' in names else tied}.weight"
        has_bias = getattr(head, "bias", None) is not None
        self._bias = f"{name}.bias" if has_bias and f"{name}.bias" in names else None

    def forward(self, hidden: Tensor) -> Tensor:
        blocks = torch.split(self._read(self._weight), _HEAD_ROWS)
        parts = [hidden @ block.to(self._device, self._dtype).mT for block in blocks]
        logits = torch.cat(parts, dim=-1)
        return logits if self._bias is None else logits + self._read(self._bias).to(logits)


def _logits(shell: Shell, given: list[_Given], rows: Tensor) -> Tensor:
    for stub in given:
        stub.rows = rows.to(shell.device, shell.dtype)
    nothing = torch.zeros(1, *rows.shape, dtype=shell.dtype, device=shell.device)
    logits: Tensor = shell.model(inputs_embeds=nothing, use_cache=False).logits[0]
    return logits


def _head(model: Any) -> tuple[str, nn.Module]:
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head and head is not None:
            return name, module
    raise RainError(f"{type(model).__name__}: found no head that gives next-token logits")


def _fill_rest(shell: Shell, stack: ExitStack) -> None:
    """Everything of the decoder beside its layers and the embedding: the final norm, mostly."""
    embedding = shell.decoder.get_input_embeddings()
    for name, part in shell.decoder.named_children():
        if part is not embedding and part is not shell.layers:
            stack.enter_context(shell.filled(part, ".".join(filter(None, (shell.home, name)))))
