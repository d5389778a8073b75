"""The experts function that transformers calls during calibration, and observing its calls.

Registered by name (`ExpertsInterface`), like our attention function: the module's own gate,
activation, biases and orientation are used, one expert after the other, so that the tokens routed
to each of them, and what its down projection sees, are known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

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
    are the names; transposed: they are (E, d_in, d_out) rather than (E, d_out, d_in). chosen: the
    experts that each token goes to, and gates: how much each of them counts, both (n, k).
    """

    module: nn.Module
    inputs: Tensor
    up: str
    down: str
    transposed: bool
    count: int
    chosen: Tensor
    gates: Tensor


@dataclass(frozen=True)
class ExpertsObserver:
    """begin: at each use; inner: for each expert with tokens, what its down projection sees.

    inner(call, expert, tokens (m), features (m, d_ff)): `tokens` are rows of call.inputs.
    end(call, result (n, d)): with what all of them give together.
    """

    begin: Callable[[ExpertsCall], None]
    inner: Callable[[ExpertsCall, int, Tensor, Tensor], None]
    end: Callable[[ExpertsCall, Tensor], None] = lambda _call, _result: None


# Low-rank changes A Bᵀ of single experts: by the name of the weight and the expert, A (d_out, r)
# and B (d_in, r).
ExpertChanges: TypeAlias = "Mapping[tuple[str, int], tuple[Tensor, Tensor]]"
# reader(name, expert): the weight of one expert, by the name of its parameter in the module.
ExpertReader: TypeAlias = "Callable[[str, int], Tensor]"

_OBSERVER: ContextVar[ExpertsObserver | None] = ContextVar("rain_experts_observer", default=None)
_CHANGES: ContextVar[Mapping[nn.Module, ExpertChanges] | None] = ContextVar(
    "rain_experts_changes", default=None
)
_READERS: ContextVar[Mapping[nn.Module, ExpertReader] | None] = ContextVar(
    "rain_experts_readers", default=None
)
_BUDGET: ContextVar[int | None] = ContextVar("rain_experts_budget", default=None)


def observe_experts(observer: ExpertsObserver) -> AbstractContextManager[None]:
    """Let `observer` see every use of experts inside the block."""
    return holding(_OBSERVER, observer)


def changed_experts(changes: Mapping[nn.Module, ExpertChanges]) -> AbstractContextManager[None]:
    """Inside the block the experts of these modules compute with W + A Bᵀ; W stays as it is.

    So a weight that is kept in a narrow type is not rounded again.
    """
    return holding(_CHANGES, changes)


def read_one_by_one(readers: Mapping[nn.Module, ExpertReader]) -> AbstractContextManager[None]:
    """Inside the block the experts of these modules, too, are read whenever they are used."""
    return holding(_READERS, {**(_READERS.get() or {}), **readers})


def experts_budget(size: int | None) -> AbstractContextManager[None]:
    """Inside the block a layer's experts of more bytes than that are read when they are used."""
    return holding(_BUDGET, size)


def has_budget() -> bool:
    """Whether there is a size beyond which a layer's experts are read when they are used."""
    return _BUDGET.get() is not None


def beyond_budget(size: int) -> bool:
    """Whether a layer's experts of so many bytes, as stored, are read when they are used."""
    budget = _BUDGET.get()
    return budget is not None and size > budget


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
    call = ExpertsCall(
        module=module,
        inputs=hidden,
        up=up,
        down="down_proj",
        transposed=module.is_transposed,
        count=module.num_experts,
        chosen=top_k_index,
        gates=top_k_weights,
    )
    observer, changed = _OBSERVER.get(), _CHANGES.get()
    changes = changed.get(module, {}) if changed else {}
    if observer is not None:
        observer.begin(call)
    total = torch.zeros_like(hidden)
    for expert in range(call.count):
        tokens, place = torch.where(top_k_index == expert)
        if tokens.numel() == 0:
            continue
        product = expert_product(module, up, expert, hidden[tokens], changes)
        inner = activated(module, product)
        if observer is not None:
            observer.inner(call, expert, tokens, inner)
        out = expert_product(module, "down_proj", expert, inner, changes)
        if normalised(module):
            out = module.post_expert_norm(out)
        weighted = out * top_k_weights[tokens, place, None]
        total.index_add_(0, tokens, weighted.to(total.dtype))
    if observer is not None:
        observer.end(call, total)
    return total


def normalised(module: Any) -> bool:
    """Whether each expert's output passes a norm; older transformers know no such norm."""
    return bool(getattr(module, "has_post_expert_norm", False))


def activated(module: Any, product: Tensor) -> Tensor:
    """What an expert's second projection sees (m, d_ff), of what its first gives (m, d_out)."""
    result: Tensor = module._apply_gate(product) if module.has_gate else module.act_fn(product)  # noqa: SLF001
    return result


def expert_product(
    module: Any, name: str, expert: int, rows: Tensor, changes: ExpertChanges | None = None
) -> Tensor:
    """One projection of one expert on rows (m, d_in), with its bias and its change."""
    out = expert_linear(module, name, expert, rows)
    if changes and (name, expert) in changes:
        a, b = changes[name, expert]
        out = out + (rows @ b.to(rows)) @ a.to(rows).mT
    return out + getattr(module, f"{name}_bias")[expert] if module.has_bias else out


def expert_linear(module: Any, name: str, expert: int, rows: Tensor) -> Tensor:
    """One projection of one expert without its bias, rows (m, d_in) to (m, d_out)."""
    readers = _READERS.get()
    reader = readers.get(module) if readers else None
    stored = getattr(module, name)[expert] if reader is None else reader(name, expert)
    weight = stored.to(rows.dtype)
    return rows @ weight if module.is_transposed else nn.functional.linear(rows, weight)
