"""The experts function that transformers calls during calibration, and observing its calls.

Registered by name (`ExpertsInterface`), like our attention function: the module's own gate,
activation, biases and orientation are used, one expert after the other, so that the tokens routed
to each of them, and what its down projection sees, are known.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from rain_mergekit.system.context_value import holding

NAME = "rain_mergekit"
# A tensor of experts that would take more than this in the type of the forward pass stays as it is
# stored; each expert is converted when it is used.
AT_ONCE = 256 * 1024**2


@dataclass(frozen=True)
class ExpertsCall:
    """One use of a layer's routed experts.

    inputs: (n, d), what all experts see; module: holds the 3-D weights, of which `up` and `down`
    are the names; transposed: they are (E, d_in, d_out) rather than (E, d_out, d_in).
    """

    module: nn.Module
    inputs: Tensor
    up: str
    down: str
    transposed: bool
    count: int


@dataclass(frozen=True)
class ExpertsObserver:
    """begin: at each use; inner: for each expert with tokens, what its down projection sees.

    inner(call, expert, tokens (m), features (m, d_ff)): `tokens` are rows of call.inputs.
    """

    begin: Callable[[ExpertsCall], None]
    inner: Callable[[ExpertsCall, int, Tensor, Tensor], None]


_OBSERVER: ContextVar[ExpertsObserver | None] = ContextVar("rain_experts_observer", default=None)


def observe_experts(observer: ExpertsObserver) -> AbstractContextManager[None]:
    """Let `observer` see every use of experts inside the block."""
    return holding(_OBSERVER, observer)


def expert_weights(model: nn.Module) -> frozenset[str]:
    """The names of the 3-D weights that `_experts` computes with, one expert after the other."""
    return frozenset(
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if getattr(getattr(module, "config", None), "_experts_implementation", None) == NAME
        and hasattr(module, "is_transposed")
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    )


def stays_stored(count: int, itemsize: int, stored: int) -> bool:
    """Whether `count` weights of experts stay in the narrower type in which they are stored.

    itemsize: bytes a number in the forward pass; stored: on disk.
    """
    return stored < itemsize and count * itemsize > AT_ONCE


def register() -> None:
    """Make the experts function known to transformers; idempotent."""
    ExpertsInterface.register(NAME, _experts)


def _experts(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden (n, d), both routing tensors (n, k) -> (n, d)."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    call = ExpertsCall(module, hidden, up, "down_proj", module.is_transposed, module.num_experts)
    observer = _OBSERVER.get()
    if observer is not None:
        observer.begin(call)
    total = torch.zeros_like(hidden)
    for expert in range(call.count):
        tokens, place = torch.where(top_k_index == expert)
        if tokens.numel() == 0:
            continue
        inner = _inner(module, hidden[tokens], expert, up)
        if observer is not None:
            observer.inner(call, expert, tokens, inner)
        out = _product(module, "down_proj", expert, inner)
        if getattr(module, "has_post_expert_norm", False):  # older transformers know no such norm
            out = module.post_expert_norm(out)
        weighted = out * top_k_weights[tokens, place, None]
        total.index_add_(0, tokens, weighted.to(total.dtype))
    return total


def _inner(module: Any, rows: Tensor, expert: int, up: str) -> Tensor:
    product = _product(module, up, expert, rows)
    result: Tensor = module._apply_gate(product) if module.has_gate else module.act_fn(product)  # noqa: SLF001
    return result


def _product(module: Any, name: str, expert: int, rows: Tensor) -> Tensor:
    weight = getattr(module, name)[expert].to(rows.dtype)
    out = rows @ weight if module.is_transposed else nn.functional.linear(rows, weight)
    return out + getattr(module, f"{name}_bias")[expert] if module.has_bias else out
