"""How fast this machine multiplies, decomposes, copies and reads, measured in a few seconds."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_SIDE, _EIGEN_SIDE, _SECONDS, _LEAST = 1024, 768, 0.3, 2
_COPIED = 32 * 1024**2
_READ, _BLOCK = 128 * 1024**2, 8 * 1024**2


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        products: floating-point operations of matrix products in the type of the forward pass.
        double: those of products in float64.
        eigen: n³, summed over symmetric eigenvalue decompositions of n x n in float64.
        memory: bytes read and written by copies in memory.
        read: bytes read from the disk itself, not from the system's page cache.
        write: bytes written to the disk.
    """

    products: float
    double: float
    eigen: float
    memory: float
    read: float
    write: float


def measure_rates(
    device: str,
    dtype: torch.dtype,
    folder: Path,
    clock: Callable[[], float] = time.perf_counter,
) -> Rates:
    """Measure with torch's threads; the disk is that of `folder`, which must be writable.

    clock: gives seconds; one that counts processor time where other programs keep the machine busy.
    """
    written, read = disk_rates(folder)
    symmetric = torch.randn(_EIGEN_SIDE, _EIGEN_SIDE, dtype=torch.float64, device=device)
    symmetric += symmetric.mT.clone()
    source = torch.ones(_COPIED // 4, device=device)
    target = torch.empty_like(source)
    return Rates(
        products=multiply_rate(device, dtype, clock),
        double=multiply_rate(device, torch.float64, clock),
        eigen=_rate(lambda: torch.linalg.eigh(symmetric), device, clock) * _EIGEN_SIDE**3,
        memory=_rate(lambda: target.copy_(source), device, clock) * 2 * _COPIED,
        read=read,
        write=written,
    )


def multiply_rate(
    device: str, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Floating-point operations a second of products of square matrices, with torch's threads."""
    one = torch.ones(_SIDE, _SIDE, dtype=dtype, device=device)
    return _rate(lambda: one @ one, device, clock) * 2.0 * _SIDE**3


def disk_rates(folder: Path) -> tuple[float, float]:
    """Bytes a second written to, and read from, the disk of that folder.

    An OSError passes through, for example where the disk is full.
    """
    block = os.urandom(_BLOCK)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        start = time.perf_counter()
        for _ in range(_READ // _BLOCK):
            file.write(block)
        os.fsync(file.fileno())
        written = time.perf_counter() - start
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        buffer, start = bytearray(_BLOCK), time.perf_counter()
        while file.readinto(buffer):
            pass
        return _READ / written, _READ / (time.perf_counter() - start)


def _rate(work: Callable[[], Any], device: str, clock: Callable[[], float]) -> float:
    """Calls of `work` a second; the first call, which sets up libraries, is not counted."""
    _done(work(), device)
    count, start = 0, clock()
    # By the clock itself: of processor time little passes in a second of a busy machine.
    while count < _LEAST or clock() - start < _SECONDS:
        _done(work(), device)
        count += 1
    return count / (clock() - start)


def _done(_result: Any, device: str) -> None:
    kind = torch.device(device).type
    if kind != "cpu":
        backend: Any = getattr(torch, kind)
        backend.synchronize()
