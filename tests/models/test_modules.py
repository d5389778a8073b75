"""Head layouts of the families, against what their own attention does with the weights.

Each module's rows (or columns) that a coefficient of one head scales are disturbed in the real
layer; only that head's queries, keys, values or output may feel it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from architectures import family_config, layers_of
from tiny import model_config
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from rain_mergekit.capture.input_sites import site_name
from rain_mergekit.models.head_layout import HeadLayout, WeightKind

KINDS = {
    # what a plain decoder has
    **dict.fromkeys(["q_proj"], WeightKind.QUERY),
    **dict.fromkeys(["k_proj", "v_proj"], WeightKind.KEY_VALUE),
    **dict.fromkeys(["o_proj", "out_proj", "dense"], WeightKind.OUTPUT),
}
# Modules with heads besides these, by family; the attention module's name, if it is another one.
SPECIAL: dict[str, dict[str, WeightKind]] = {
    "phi3": {"qkv_proj": WeightKind.BLOCKS},
    "gpt2": {"c_attn": WeightKind.BLOCKS, "c_proj": WeightKind.OUTPUT},
    "gpt_bigcode": {"c_attn": WeightKind.GROUPS, "c_proj": WeightKind.OUTPUT},
    "gpt_neox": {"query_key_value": WeightKind.GROUPS},
    "deepseek_v2": {"q_b_proj": WeightKind.QUERY, "kv_b_proj": WeightKind.QUERY},
    "deepseek_v3": {"q_b_proj": WeightKind.QUERY, "kv_b_proj": WeightKind.QUERY},
    "afmoe": {"gate_proj": WeightKind.QUERY},
}
# Latent attention's projections to the low rank, which all heads share.
LOW_RANK = {"q_a_proj", "kv_a_proj_with_mqa"}
PLAIN = ["qwen2", "qwen3", "llama", "mistral"]
OTHERS = [
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "gpt_neox",
    "gpt2",
    "gpt_bigcode",
    "olmo2",
    "cohere",
    "cohere2",
    "starcoder2",
    "granite",
    "glm",
    "glm4",
    "smollm3",
    "exaone4",
    "stablelm",
    "nemotron",
    "opt",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "afmoe",
    "llama4_text",
    "qwen3_next",
    "qwen3_5_text",
    "granitemoehybrid",
    "lfm2",
    "jamba",
    "falcon_h1",
]


class Probe:
    """What attention was called with, and a way to silence one head's output."""

    def __init__(self) -> None:
        self.module: Any = None
        self.tensors: dict[str, Tensor] = {}
        self.silenced: int | None = None

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _attention_mask: Any = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        self.module = module
        self.tensors = {"query": query[0], "key": key[0], "value": value[0]}
        keep = {name: options[name] for name in ("scaling",) if name in options}
        output, _ = sdpa_attention_forward(module, query, key, value, None, is_causal=True, **keep)
        if self.silenced is not None:
            output = output.clone()
            output[:, :, self.silenced] = 0
        return output, None


@contextmanager
def probed(family: str) -> Iterator[tuple[nn.Module, Any, Probe]]:
    """The last layer of a random model, a function that runs it, and the probe of its attention."""
    torch.manual_seed(5)
    probe = Probe()
    AttentionInterface.register("rain_test_probe", probe)
    AttentionMaskInterface.register("rain_test_probe", eager_mask)
    config = model_config(family) if family in PLAIN else family_config(family)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="rain_test_probe", experts_implementation="eager"
    ).double()
    model.eval()
    layer = layers_of(model)[1][-1]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = layer.register_forward_pre_hook(
        lambda _module, args, named: calls.append((args, named)), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=torch.arange(10, 22)[None], use_cache=False)
    handle.remove()
    args, named = calls[0]

    def run() -> Tensor:
        with torch.no_grad():
            output = layer(*args, **named)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    yield layer, run, probe


def layout_of(layer: nn.Module, probe: Probe, model_type: str) -> HeadLayout:
    name = next(n for n, module in layer.named_modules() if module is probe.module)
    query, key, value = (probe.tensors[part].shape for part in ("query", "key", "value"))
    return HeadLayout(name, query[0], key[0], query[-1], value[-1], model_type)


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, list[int]]:
    """By tensor, which heads are not what they were."""
    return {
        part: (after[part] - before[part]).abs().amax((1, 2)).gt(1e-9).nonzero().flatten().tolist()
        for part in before
    }


@pytest.mark.parametrize("family", PLAIN + OTHERS)
def test_a_heads_coefficient_scales_what_only_that_head_uses(family: str) -> None:
    with probed(family) as (layer, run, probe):
        run()
        layout = layout_of(layer, probe, family)
        modules = dict(attention_modules(layer, layout, family))
        expected = SPECIAL.get(family) or KINDS
        found = {
            name: layout.kind(f"{layout.module}.{name}", m) for name, (_, m) in modules.items()
        }
        with_heads = {name: kind for name, kind in found.items() if kind is not WeightKind.LAYER}
        assert set(found) - set(with_heads) <= LOW_RANK
        assert all({**KINDS, **expected}[name] is kind for name, kind in with_heads.items())
        for name, kind in with_heads.items():
            weight, matrix = modules[name]
            for head in range(layout.heads):
                check_head(
                    layout, f"{layout.module}.{name}", kind, head, weight, matrix, run, probe
                )


def attention_modules(
    layer: nn.Module, layout: HeadLayout, family: str
) -> Iterator[tuple[str, tuple[Tensor, tuple[int, int]]]]:
    """Weights right inside the attention module, as (d_out, d_in) views, with their shape."""
    for name, weight in layer.get_submodule(layout.module).named_parameters():
        short = site_name(name)
        if weight.dim() == 2 and "." not in short and "norm" not in short:
            view = weight.data.mT if family == "gpt2" else weight.data
            yield short, (view, (view.shape[0], view.shape[1]))


def check_head(
    layout: HeadLayout,
    name: str,
    kind: WeightKind,
    head: int,
    weight: Tensor,
    matrix: tuple[int, int],
    run: Any,
    probe: Probe,
) -> None:
    alpha = torch.zeros(layout.heads, dtype=torch.float64)
    alpha[head] = 1.0
    scale = layout.scales(name, alpha, matrix)
    saved = weight.clone()
    if kind is WeightKind.OUTPUT:
        assert scale.rows is None
        assert scale.cols is not None
        weight[:, scale.cols != 0] = 0
        without = run()
        weight.copy_(saved)
        probe.silenced = head
        assert torch.allclose(run(), without, atol=1e-9)
        probe.silenced = None
        assert not torch.allclose(run(), without, atol=1e-9)
        return
    assert scale.cols is None
    assert scale.rows is not None
    output = run()
    before = dict(probe.tensors)
    weight[scale.rows != 0] *= -1  # keeps the norm, for families that normalise over all heads
    disturbed = run()
    after = dict(probe.tensors)
    weight.copy_(saved)
    assert not torch.allclose(output, disturbed, atol=1e-9)
    shared = head // (layout.heads // layout.kv_heads)
    allowed = {"query": [head], "key": [shared], "value": [shared]}
    found = changed(before, after)
    touched = [part for part in found if found[part]]
    gate = name.endswith("gate_proj")
    assert gate or touched
    assert all(found[part] == allowed[part] for part in touched), (name, found)
    # Every row belongs to some head: together the heads scale all of them, each once.
    everything = layout.scales(name, torch.ones_like(alpha), matrix).rows
    assert everything is not None
    assert torch.equal(everything, torch.ones_like(everything))


def test_layer_modules_share_the_mean_of_their_heads() -> None:
    layout = HeadLayout("self_attn", heads=4, kv_heads=2, width=12, value_width=12)
    alpha = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
    for module in ("mlp.gate_proj", "mlp.down_proj", "other.q_proj", "self_attn.q_a_proj"):
        scale = layout.scales(module, alpha, (3, 7))
        assert scale.rows is not None
        assert scale.rows.tolist() == [1.25] * 3


def test_a_module_that_does_not_fit_the_heads_is_scaled_as_a_whole() -> None:
    layout = HeadLayout("self_attn", heads=4, kv_heads=2, width=12, value_width=12)
    assert layout.kind("self_attn.q_proj", (48, 48)) is WeightKind.QUERY
    assert layout.kind("self_attn.q_proj", (96, 48)) is WeightKind.QUERY  # with an output gate
    for name, matrix in (("q_proj", (50, 48)), ("k_proj", (48, 48)), ("o_proj", (48, 24))):
        assert layout.kind(f"self_attn.{name}", matrix) is WeightKind.LAYER
    assert layout.kind("self_attn.qkv_proj", (95, 48)) is WeightKind.LAYER
