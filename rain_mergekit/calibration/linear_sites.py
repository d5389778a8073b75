"""The sites of one layer: linear maps that receive the same tensor are fitted together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from rain_mergekit.capture.input_sites import same_tensor
from rain_mergekit.capture.left_alone import routes
from rain_mergekit.capture.linear_outputs import LinearOutput


@dataclass(frozen=True)
class LinearSite:
    """Linear maps of the layer that receive the same tensor: names, and rows of each weight."""

    width: int
    outputs: Mapping[str, int]
    input_axes: Mapping[str, int]

    @property
    def rows(self) -> int:
        """Σ d_out."""
        return sum(self.outputs.values())


def linear_sites(layer: nn.Module, found: Mapping[str, LinearOutput]) -> dict[str, LinearSite]:
    """The linear maps grouped by the tensor that they receive, in the order in which they run."""
    owners: list[tuple[Tensor, str]] = []
    members: dict[str, list[LinearOutput]] = {}
    for name, output in found.items():
        rows = int(layer.get_parameter(name).shape[-3 - output.input_axis])
        if routes(name, rows, int(output.inputs.shape[1])):
            continue
        seen = next((site for inputs, site in owners if same_tensor(inputs, output.inputs)), None)
        if seen is None:
            seen = name.removesuffix(".weight")
            owners.append((output.inputs, seen))
        members.setdefault(seen, []).append(output)
    return {
        site: LinearSite(
            width=int(outputs[0].inputs.shape[1]),
            outputs={
                one.name: int(layer.get_parameter(one.name).shape[-3 - one.input_axis])
                for one in outputs
            },
            input_axes={one.name: one.input_axis for one in outputs},
        )
        for site, outputs in members.items()
    }
