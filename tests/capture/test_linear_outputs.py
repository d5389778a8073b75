"""What a pass recorded is let go of with its outputs, and not when the collector comes by."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

from rain_mergekit.capture.linear_outputs import LayerCutShort, LinearOutputs


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.second(torch.relu(self.first(hidden)))


@pytest.mark.parametrize("wanted", [None, ["first.weight"]])
def test_nothing_of_a_pass_lives_on(wanted: list[str] | None) -> None:
    """A reference in a circle would keep a batch's tensors until the collector looks for it."""
    layer, hidden = Small(), torch.randn(1, 5, 4)
    gc.collect()
    gc.disable()
    try:
        trace = LinearOutputs(layer, 5, wanted)
        with trace, suppress(LayerCutShort), torch.no_grad():
            layer(hidden)
        found = trace.outputs()
        assert set(found) == set(wanted or ["first.weight", "second.weight"])
        seen = [weakref.ref(trace), *(weakref.ref(one.value) for one in found.values())]
        del trace
        assert seen[0]() is None
        assert all(one() is not None for one in seen[1:])
        del found
        assert all(one() is None for one in seen)
    finally:
        gc.enable()
