"""What a pass recorded is let go of with its outputs, and not when the collector comes by."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress

import pytest
import torch
from tiny import model_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rain_mergekit.capture.linear_outputs import LayerCutShort, LinearOutputs
from rain_mergekit.capture.passed_norms import PassedNorm


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


WRITERS = {"self_attn.o_proj.weight", "mlp.down_proj.weight"}


@pytest.mark.parametrize(
    ("family", "normed"),
    [
        ("gemma3_text", WRITERS),
        ("glm4", WRITERS),
        ("olmo2", WRITERS),
        ("qwen3", set()),  # queries and keys pass norms, and are added to nothing
        ("llama", set()),
    ],
)
def test_norms_are_followed_to_the_residual_stream(family: str, normed: set[str]) -> None:
    config = model_config("qwen2", model_type=family, head_dim=12, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.arange(1, 6)[None]
    trace = LinearOutputs(model.model.layers[0], tokens.numel())
    with torch.no_grad(), trace:
        model(input_ids=tokens)
    found = trace.outputs()
    assert found.keys() >= WRITERS
    assert {name for name, one in found.items() if one.normed} == normed


def test_a_change_that_a_norm_leaves_is_found_again() -> None:
    """By the norm itself: what its input must change by for a small change after it."""
    torch.manual_seed(0)
    rows, step = torch.randn(6, 16, dtype=torch.float64), torch.randn(6, 16, dtype=torch.float64)
    scale = torch.rand(16, dtype=torch.float64) + 0.5
    sizes = rows.square().mean(1, keepdim=True).sqrt()

    def passed(values: Tensor) -> Tensor:
        return scale * values / values.square().mean(1, keepdim=True).sqrt()

    norm = PassedNorm(rows, scale)
    lack = passed(rows + 1e-5 * step) - passed(rows)
    change = norm.undone(lack, rows)
    assert (change * rows).sum(1).abs().max() < 1e-12
    reached = passed(rows + change) - passed(rows)
    assert (reached - lack).norm() < 0.05 * lack.norm()
    assert torch.allclose(norm.relative(step, rows), step / sizes)
    assert not norm.relative(step, torch.zeros_like(rows)).any()
