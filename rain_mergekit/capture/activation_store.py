"""Hidden states of all samples between two layers, in memory up to a budget, else on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from rain_mergekit.errors import RainError
from rain_mergekit.system.atomic_file import replacing
from rain_mergekit.system.profile import STATES, phase


class ActivationStore:
    """One stream of hidden states, one (T_i, d) tensor a sample, in a fixed dtype.

    The first samples stay in memory, on `device`, until `budget` bytes are used, the rest has a
    fixed place in one file. Samples are overwritten in place, because a layer needs each of them
    exactly once.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        width: int,
        dtype: torch.dtype,
        budget: int,
        path: Path,
        device: torch.device | None = None,
    ) -> None:
        self._shapes = [(length, width) for length in lengths]
        self._dtype, self._device = dtype, device or torch.device("cpu")
        self._memory: dict[int, Tensor] = {}
        self._budget, self._path = budget, path
        self._descriptor: int | None = None

    @cached_property
    def _offsets(self) -> dict[int, int]:
        """Where each sample that the memory has no room for begins in the file, in bytes."""
        offsets: dict[int, int] = {}
        used = spilled = 0
        for index in range(len(self)):
            size = self._size(index)
            if used + size <= self._budget:
                used += size
            else:
                offsets[index] = spilled
                spilled += size
        return offsets

    @property
    def memory_bytes(self) -> int:
        """What the samples in memory take."""
        return sum(self._size(index) for index in range(len(self)) if index not in self._offsets)

    @property
    def disk_bytes(self) -> int:
        """What the other samples take in the file."""
        return sum(map(self._size, self._offsets))

    def __len__(self) -> int:
        return len(self._shapes)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [length for length, _ in self._shapes]

    def put(self, index: int, hidden: Tensor) -> None:
        """Store the hidden states (T, d) of one sample."""
        if tuple(hidden.shape) != self._shapes[index]:
            raise ValueError(f"sample {index}: {tuple(hidden.shape)} != {self._shapes[index]}")
        home = torch.device("cpu") if index in self._offsets else self._device
        with phase(STATES):
            self._keep(index, hidden.detach().to(home, self._dtype).contiguous())

    def _keep(self, index: int, hidden: Tensor) -> None:
        if index not in self._offsets:
            whole = hidden.untyped_storage().nbytes() == hidden.nbytes
            self._memory[index] = hidden if whole else hidden.clone()
            return
        data, written = _bytes(hidden), 0
        try:
            while written < len(data):
                written += os.pwrite(self._file(), data[written:], self._offsets[index] + written)
        except OSError as error:
            raise RainError(
                f"{self._path}: cannot keep hidden states on disk ({error.strerror}); they need "
                f"{self.disk_bytes:,} bytes there: free space, or raise --activation-budget"
            ) from None

    def get(self, index: int) -> Tensor:
        """The hidden states (T, d) last stored for one sample, wherever they were kept."""
        if index not in self._offsets:
            return self._memory[index]
        with phase(STATES):
            return self._read(index)

    def rows(self, index: int, tokens: Tensor) -> Tensor:
        """The hidden states (n, d) of some tokens (n) of one sample; only these are read."""
        if index not in self._offsets:
            memory = self._memory[index]
            return memory[tokens.to(memory.device)]
        width = self._shapes[index][1]
        if not len(tokens):
            return torch.empty(0, width, dtype=self._dtype)
        size = width * self._dtype.itemsize
        data = bytearray(len(tokens) * size)
        view, first = memoryview(data), self._offsets[index]
        with phase(STATES):
            for place, token in enumerate(tokens.tolist()):
                self._fill(view[place * size : (place + 1) * size], first + token * size)
        return torch.frombuffer(data, dtype=self._dtype).view(len(tokens), width)

    def _read(self, index: int) -> Tensor:
        data = bytearray(self._size(index))
        self._fill(memoryview(data), self._offsets[index])
        return self._tensor(index, data)

    def _fill(self, view: memoryview, start: int) -> None:
        """Read from byte `start` of the file on until `view` is full."""
        read = 0
        while read < len(view):
            count = os.preadv(self._file(), [view[read:]], start + read)
            if count == 0:
                raise RainError(f"{self._path}: was truncated by another process; run again")
            read += count

    def save(self, path: Path) -> None:
        """Write all samples to `path`, whole or not at all."""
        with replacing(path) as out:
            for index in range(len(self)):
                out.write(_bytes(self.get(index)))

    def load(self, path: Path) -> None:
        """Take all samples from what `save` wrote for the same lengths, width and dtype."""
        with path.open("rb") as source:
            for index in range(len(self)):
                data = bytearray(self._size(index))
                if source.readinto(data) != len(data):
                    raise OSError(f"{path}: shorter than the samples that it should hold")
                self.put(index, self._tensor(index, data))

    def close(self) -> None:
        """Free the memory and remove the file."""
        self._memory.clear()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            self._path.unlink(missing_ok=True)

    def _size(self, index: int) -> int:
        length, width = self._shapes[index]
        return length * width * self._dtype.itemsize

    def _tensor(self, index: int, data: bytearray) -> Tensor:
        return torch.frombuffer(data, dtype=self._dtype).view(self._shapes[index])

    def _file(self) -> int:
        if self._descriptor is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        return self._descriptor


def _bytes(hidden: Tensor) -> memoryview:
    array: memoryview = memoryview(hidden.cpu().contiguous().view(torch.uint8).numpy().reshape(-1))  # type: ignore[arg-type]
    return array
