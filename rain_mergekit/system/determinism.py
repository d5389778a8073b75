"""The same bits for any number of threads: what could differ with it runs on one thread.

Large products are nearly all of the work. MKL promises their bits in its strict mode, so they keep
all threads; every other operation of torch runs on one thread, also where it is not known to depend
on their number (decompositions do, sums to one number, and whatever a vector instruction and the
loop over its remainder round differently).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rain_mergekit.system import blas_mode

LOG = logging.getLogger(__name__)
_aten: Any = torch.ops.aten
# With each operation, where among its arguments the two factors are.
_PRODUCTS = {
    _aten.mm.default: slice(0, 2),
    _aten.mm.out: slice(0, 2),
    _aten.addmm.default: slice(1, 3),
    _aten.addmm.out: slice(1, 3),
    _aten.addmm_.default: slice(1, 3),
}
# Each block of queries of a head is one thread's own work, in products of its own.
_ATTENTION = getattr(
    getattr(_aten, "_scaled_dot_product_flash_attention_for_cpu", None), "default", None
)
_EXACT = (torch.float32, torch.float64)  # products of other types are not MKL's
# Multiplications from which on several threads pay: changing their number takes 0.1 ms.
_LARGE = 2**25
# Where MKL is not in its strict mode, these differ with the number of threads.
_SHAPES = ((777, 64, 777), (64, 5003, 64), (1031, 515, 193))


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the block torch has one thread, except for matrix products."""

    def __init__(self, threads: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._threads = threads

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch for each operation that computes something."""
        kwargs = kwargs or {}
        if not _large_product(func, args):
            return func(*args, **kwargs)
        torch.set_num_threads(self._threads)
        try:
            return func(*args, **kwargs)
        finally:
            torch.set_num_threads(1)


def _large_product(func: Any, args: Sequence[Any]) -> bool:
    """Whether the product is large, and has the same bits on several threads."""
    if func is _ATTENTION:
        query, key = args[:2]
        return query.dtype in _EXACT and query.numel() * key.shape[-2] >= _LARGE
    if func not in _PRODUCTS:
        return False
    left, right = args[_PRODUCTS[func]]
    return left.dtype in _EXACT and left.numel() * right.shape[-1] >= _LARGE


@contextmanager
def deterministic(device: torch.device, *, wanted: bool = True) -> Iterator[None]:
    """Inside the block no result depends on the number of threads.

    On a GPU, torch is asked for its deterministic kernels; where it has none it warns. Does nothing
    unless `wanted`.
    """
    if not wanted:
        yield
        return
    threads = torch.get_num_threads()
    reason = _one_thread(threads) if threads > 1 and device.type == "cpu" else None
    if reason is not None:
        LOG.warning("deterministic: everything runs on one thread, because %s", reason)
    products = _Products(threads if reason is None else 1)
    torch.set_num_threads(1)
    try:
        # With one thread too: nothing is then computed in another way.
        with products if device.type == "cpu" else _deterministic_kernels():
            yield
    finally:
        torch.set_num_threads(threads)


def _one_thread(threads: int) -> str | None:
    """Why products cannot have more than one thread; None if they can."""
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return "this torch multiplies without MKL"
    if not blas_mode.strict():
        return f"{blas_mode.MKL}={blas_mode.STRICT} was not set before torch was loaded"
    if not _same_with(threads):
        return "MKL's products differ with the number of threads here"
    return None


def _same_with(threads: int) -> bool:
    """Whether products have the same bits on one thread and on `threads`: a few are tried."""
    chance = torch.Generator().manual_seed(0)
    for dtype in _EXACT:
        for rows, inner, columns in _SHAPES:
            left = torch.randn(rows, inner, dtype=dtype, generator=chance)
            right = torch.randn(inner, columns, dtype=dtype, generator=chance)
            torch.set_num_threads(1)
            alone = left @ right
            torch.set_num_threads(threads)
            if not torch.equal(alone, left @ right):
                return False
    return True


@contextmanager
def _deterministic_kernels() -> Iterator[None]:
    wanted = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    # It would touch every page of the embedding table, of which only a few rows are read.
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(wanted, warn_only=warn)
        memory.fill_uninitialized_memory = fill
