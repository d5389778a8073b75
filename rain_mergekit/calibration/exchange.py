"""What the processes of one calibration exchange: feature rows, then the results of the sites.

With a single process nothing is exchanged.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from rain_mergekit.calibration.site_solver import SiteResult
from rain_mergekit.linalg.row_collector import RowCollector
from rain_mergekit.system.distributed import World

_CPU = torch.device("cpu")


def collect_rows(world: World, collector: RowCollector, width: int, owner: int) -> None:
    """Send the rows of one group to the site's owner; the other collectors are emptied."""
    if world.size == 1:
        return
    block, count = collector.take(width, world.device)
    mine = torch.tensor([block.shape[0], count], device=world.device)
    sizes = [torch.zeros_like(mine) for _ in range(world.size)]
    dist.all_gather(sizes, mine)
    for rank, (rows, positions) in enumerate(size.tolist() for size in sizes):
        if rows and rank == owner == world.rank:
            collector.put(block, positions)
        elif rows and rank == world.rank:
            dist.send(block, owner)
        elif rows and owner == world.rank:
            other = block.new_empty((rows, width))
            dist.recv(other, rank)
            collector.put(other, positions)


def share_result(world: World, result: SiteResult | None, owner: int) -> SiteResult:
    """The owner's result of one site, on every process; the others give None."""
    if world.size == 1 and result is not None:
        return result
    sent = None if result is None else result.to(_CPU)
    return world.broadcast(sent, owner).to(world.device)
