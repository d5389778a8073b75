"""Several processes on one calibration (torchrun): samples are split, statistics are brought back.

Every operation is also right for one process alone, where it does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rain_mergekit.calibration.site_solver import SiteResult
from rain_mergekit.errors import RainError
from rain_mergekit.linalg.feature_rows import STATISTICS_DTYPE
from rain_mergekit.linalg.projection import Factors
from rain_mergekit.linalg.row_collector import RowCollector

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among `size` of them; `device` is where its tensors live."""

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
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def agree(self, flag: bool) -> bool:
        """What the first process says."""
        tensor = torch.tensor([flag], dtype=torch.int64, device=self.device)
        return bool(self._shared(tensor, 0).item())

    def sum(self, tensor: Tensor) -> Tensor:
        """Element by element over all processes."""
        if self.size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def collect(self, collector: RowCollector, width: int, owner: int) -> None:
        """Bring the rows of one group to their owner; the others' collectors become empty."""
        if self.size == 1:
            return
        block, count = collector.take(width, self.device)
        mine = torch.tensor([block.shape[0], count], device=self.device)
        sizes = [torch.zeros_like(mine) for _ in range(self.size)]
        dist.all_gather(sizes, mine)
        for rank, (rows, positions) in enumerate(size.tolist() for size in sizes):
            if rows and rank == owner == self.rank:
                collector.put(block, positions)
            elif rows and rank == self.rank:
                dist.send(block, owner)
            elif rows and owner == self.rank:
                other = block.new_empty((rows, width))
                dist.recv(other, rank)
                collector.put(other, positions)

    def share(self, result: SiteResult | None, owner: int) -> SiteResult:
        """The owner's result, on every process."""
        if self.size == 1 and result is not None:
            return result
        if result is None:
            numbers = torch.zeros(8, dtype=STATISTICS_DTYPE, device=self.device)
        else:
            numbers = torch.tensor(_numbers(result), dtype=STATISTICS_DTYPE, device=self.device)
        width, rank, values, oblique, positions, kept, response, capped = self._shared(
            numbers, owner
        ).tolist()
        shapes = [(int(values),), (int(values),), (int(width), int(rank))]
        shapes += [(int(width), int(rank))] if oblique else []
        empty = [torch.empty(s, dtype=STATISTICS_DTYPE, device=self.device) for s in shapes]
        tensors = empty if result is None else _tensors(result)
        spectrum, energies, u, *v = [self._shared(tensor, owner) for tensor in tensors]
        factors = Factors(u, v[0] if v else u)
        return SiteResult(
            int(width), int(positions), factors, spectrum, energies, kept, response, bool(capped)
        )

    def _shared(self, tensor: Tensor, owner: int) -> Tensor:
        if self.size > 1:
            tensor = tensor.to(self.device, copy=True).contiguous()
            dist.broadcast(tensor, owner)
        return tensor


def _numbers(result: SiteResult) -> list[float]:
    oblique = result.factors.v is not result.factors.u
    sizes = (result.width, result.rank, result.spectrum.numel(), oblique, result.positions)
    return [*map(float, sizes), result.kept_energy, result.kept_response_energy, result.capped]


def _tensors(result: SiteResult) -> list[Tensor]:
    tensors = [result.spectrum, result.energies, result.factors.u]
    return tensors if result.factors.v is result.factors.u else [*tensors, result.factors.v]


def join(device: str) -> World:
    """Join the processes that torchrun started, or stand alone.

    Each process takes the GPU of its local rank. Raises RainError if there are not enough.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(torch.device(device))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    where = torch.device(device)
    if where.type == "cuda":
        if local >= torch.cuda.device_count():
            raise RainError(
                f"torchrun started process {local + 1} here, but there are "
                f"{torch.cuda.device_count()} GPUs: use that --nproc-per-node, or --device cpu"
            )
        where = torch.device("cuda", local)
        torch.cuda.set_device(where)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    return World(where, dist.get_rank(), size)


def leave(world: World) -> None:
    """End what `join` began."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()
