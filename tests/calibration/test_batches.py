"""Texts of similar length pass a layer together: the same factors, fewer calls."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from stored_changes import products
from tiny import FAMILIES, Tiny
from torch import Tensor, nn

from rain_mergekit.calibration import layer_passes
from rain_mergekit.calibration.fit_rule import sums_bytes
from rain_mergekit.capture.layer_calls import LayerCall, run_layer
from rain_mergekit.capture.text_batches import TextBatch, agree, batches
from rain_mergekit.models.attention import BlockMask

# One penalty for both, as the choice between two that are as good may fall either way.
FIXED = {"fit": "streams", "stream_rank_share": 1.0, "max_rank": 1000, "stream_epsilon": 0.01}
TOGETHER = 4096  # tokens: all texts of a set


def counted(tiny: Tiny, **options: Any) -> int:
    """How often a layer was called in a calibration."""
    calls: list[int] = []

    def counting(run: Any, layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
        calls.append(hidden.shape[0] if hidden.dim() > 2 else 1)
        return run(layer, hidden, call)  # type: ignore[no-any-return]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_passes, "run_layer", partial(counting, layer_passes.run_layer))
        tiny.calibrate(**options)
    return len(calls)


def same_factors(tiny: Tiny, **options: Any) -> tuple[int, int]:
    """Check that both ways give the same changes; the calls of each."""
    alone = counted(tiny.using("alone.rain.safetensors", **FIXED), batch_tokens=0, **options)
    other = tiny.using("together.rain.safetensors", **FIXED)
    together = counted(other, batch_tokens=TOGETHER, **options)
    expected = products(other.path.with_name("alone.rain.safetensors"))
    found = products(other.path)
    assert expected.keys() == found.keys()
    for name, change in expected.items():
        assert float((found[name] - change).norm()) <= 1e-5 * float(change.norm()), name
    return alone, together


@pytest.mark.parametrize("family", FAMILIES)
def test_together_gives_the_factors_of_one_by_one(tmp_path: Path, family: str) -> None:
    alone, together = same_factors(Tiny.make(tmp_path, family), dtype=torch.float64)
    assert together < alone / 2


# A sliding window, score capping, sinks, experts, a recurrence, alibi (which takes one text alone).
@pytest.mark.parametrize(
    "family", ["gemma2", "gpt_oss", "qwen3_moe", "deepseek_v3", "qwen3_next", "mamba", "bloom"]
)
def test_every_kind_of_layer_gives_the_same(tmp_path: Path, family: str) -> None:
    alone, together = same_factors(architectures.make(tmp_path, family), dtype=torch.float64)
    assert together <= alone


def test_within_some_directions_of_a_wide_input_too(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "llama", intermediate_size=640)
    budget = sums_bytes(640)  # half of it: fewer directions
    alone, together = same_factors(tiny, dtype=torch.float64, activation_budget=budget)
    assert together < alone / 2


def test_float32_differs_by_rounding(tmp_path: Path) -> None:
    same_factors(Tiny.make(tmp_path, "qwen2"))


class Mean(nn.Module):
    """Each token sees all tokens, those of the padding too."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + hidden.mean(1, keepdim=True)


class Running(nn.Module):
    """Each token sees those before it."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + hidden.cumsum(1)


class OneText(nn.Module):
    """Raises for several texts, as code that was written for one does."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.view(1, hidden.shape[1], 8)


@pytest.mark.parametrize(
    ("layer", "together"), [(Running(), True), (Mean(), False), (OneText(), False)]
)
def test_what_looks_ahead_or_takes_one_text_is_noticed(layer: nn.Module, together: bool) -> None:
    states = [torch.randn(5, 8), torch.randn(3, 8)]
    empty = LayerCall((), {})
    batch = TextBatch((0, 1), (5, 3))
    assert agree(layer, batch, states.__getitem__, lambda _: empty) is together
    assert run_layer(Running(), states[0], empty).shape == (5, 8)


def call(**arguments: Any) -> list[LayerCall]:
    return [LayerCall((), arguments)]


def causal(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
    return key <= query


def window(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
    return (key <= query) & (key > query - 2)


@pytest.mark.parametrize(
    ("long", "short", "together"),
    [
        ({"a": torch.arange(6)[None]}, {"a": torch.arange(4)[None]}, True),
        ({"a": torch.arange(6)[None]}, {"a": torch.arange(1, 5)[None]}, False),  # its own numbers
        ({"a": torch.zeros(1, 6)}, {"a": torch.zeros(1, 4).double()}, False),
        ({"a": (None, 1.5)}, {"a": (None, 1.5)}, True),
        ({"a": (None, 1.5)}, {"a": (None, 2.5)}, False),
        ({"a": 1}, {"b": 1}, False),
        ({"a": BlockMask(causal, 6)}, {"a": BlockMask(causal, 4)}, True),
        ({"a": BlockMask(window, 6)}, {"a": BlockMask(causal, 4)}, False),
        ({"a": object()}, {"a": object()}, False),  # nobody knows what it is
    ],
)
def test_texts_stay_apart_where_their_arguments_differ(
    long: dict[str, Any], short: dict[str, Any], together: bool
) -> None:
    found = batches([call(**short), call(**long)], [4, 6], 100)
    expected = (
        [TextBatch((1, 0), (6, 4))] if together else [TextBatch((1,), (6,)), TextBatch((0,), (4,))]
    )
    assert found == expected


def test_batches_stay_within_the_tokens_and_have_the_longest_first() -> None:
    lengths = [3, 9, 4, 8, 2, 20]
    found = batches([call()] * 6, lengths, 18)
    assert [one.texts for one in found] == [(5,), (1, 3), (2, 0, 4)]
    assert all(len(one.texts) * one.lengths[0] <= 18 or len(one.texts) == 1 for one in found)
    assert [one.texts for one in batches([call()] * 6, lengths, 0)] == [
        (index,) for index in (5, 1, 3, 2, 0, 4)
    ]


def test_parts_are_the_texts_without_their_padding() -> None:
    batch = TextBatch((7, 3), (3, 2))
    joined = batch.join([torch.ones(3, 2), torch.full((2, 2), 2.0)])
    assert joined.shape == (2, 3, 2)
    assert torch.equal(batch.part(joined, 1), torch.full((2, 2), 2.0))
    assert not joined[1, 2].any()
    rows = torch.arange(6)[:, None]  # as maps give them, one row for each place
    assert batch.part(rows, 1).flatten().tolist() == [3, 4]
    assert batch.only(lambda text: text == 3) == TextBatch((3,), (2,))
    assert batch.only(lambda _: False) is None
