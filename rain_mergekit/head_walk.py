"""The last step of a calibration that merges the map to the vocabulary too."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from rain_mergekit.capture import Shell
from rain_mergekit.chunks import TokenChunks
from rain_mergekit.distributed import World
from rain_mergekit.features import RowCollector
from rain_mergekit.head import arriving
from rain_mergekit.observe import SiteMap
from rain_mergekit.settings import RainSettings
from rain_mergekit.vocabulary import HeadWeight
from rain_mergekit.walk import LayerResult, LayerWalk, Stream
from rain_mergekit.weights import TrioTensors


class HeadWalk(LayerWalk):
    """What a `LayerWalk` does at a layer, at the head: one site, no layer to pass."""

    def __init__(self, shell: Shell, settings: RainSettings, world: World) -> None:
        nothing = nn.Module()
        super().__init__(
            len(shell.layers), nothing, "", settings, lambda _: None, TokenChunks(), world
        )
        self._shell = shell

    def features(
        self, sites: SiteMap, streams: Sequence[Stream]
    ) -> dict[str, dict[str, RowCollector]]:
        """What the head receives at the positions of use, from what left the last layer."""
        collected: dict[str, dict[str, RowCollector]] = {}
        (site,) = sites.owners
        with arriving(self._shell) as arrive:
            for stream in streams:
                for sample in range(len(stream)):
                    rows = arrive(stream.store.get(sample).to(self._device))
                    self._picker(collected, stream, sample)(site, rows, None)
        return collected

    def result(
        self, head: HeadWeight, trio: TrioTensors, streams: Sequence[Stream], max_rank: int
    ) -> LayerResult:
        """The head's contribution to the calibration file."""
        sites = head.sites
        collected = self.features(sites, streams)
        solved = self.solve(
            sites,
            collected,
            lambda weight, _: (
                head.task_vector(trio, self._device) if weight.name == head.name else iter(())
            ),
            max_rank,
            replace=False,
        )
        return LayerResult(sites, solved, tokens=head.rows)
