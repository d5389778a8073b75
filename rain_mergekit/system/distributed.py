"""Several processes share one calibration (torchrun): samples are split, statistics are summed.

With a single process every operation does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rain_mergekit.errors import RainError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One process among `size`; `device` is where its tensors are."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of the items."""
        return items[self.rank :: self.size]

    def owner(self, index: int) -> int:
        """The process that solves site `index`."""
        return index % self.size

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def agree(self, flag: bool) -> bool:
        """The value of the first process, on every process."""
        return self.broadcast(flag, 0)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, element by element."""
        if self.size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def broadcast(self, value: T | None, owner: int) -> T:
        """The owner's value, on every process; its tensors must be on the CPU."""
        values: list[Any] = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, owner, device=self.device)
        result: T = values[0]
        return result

    def rows(self, own: Tensor) -> Tensor:
        """The rows of all processes, in the order of their ranks."""
        if self.size == 1:
            return own
        parts = [self.same(own, rank) for rank in range(self.size)]
        return torch.cat(parts)

    def same(self, tensor: Tensor, owner: int = 0) -> Tensor:
        """The owner's tensor, on every process; its shape may differ."""
        if self.size == 1:
            return tensor
        return self.broadcast(tensor.cpu(), owner).to(tensor.device)


def join(device: str) -> World:
    """Join the processes that torchrun started, or stand alone.

    Each process takes the GPU of its local rank. Raises RainError if there are not enough.
    """
    size, where = int(os.environ.get("WORLD_SIZE", "1")), torch.device(device)
    if size == 1:
        return World(where)
    if where.type == "cuda":
        where = _own_gpu(int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(where)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    return World(where, dist.get_rank(), size)


def _own_gpu(local: int) -> torch.device:
    if local >= torch.cuda.device_count():
        raise RainError(
            f"torchrun started process {local + 1} here, but there are "
            f"{torch.cuda.device_count()} GPUs: use that --nproc-per-node, or --device cpu"
        )
    return torch.device("cuda", local)


def leave(world: World) -> None:
    """Leave the process group that `join` entered."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()
