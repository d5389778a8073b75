"""Layers one at a time against the whole model, and how often each layer is passed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, SITES, Dense, Tiny, linear_inputs
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from rain_mergekit.capture.input_sites import SiteMap, capture_inputs
from rain_mergekit.capture.layer_calls import run_layer
from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.errors import RainError
from rain_mergekit.models import attention
from rain_mergekit.models.loading import LoadOptions, open_trio

SAMPLES = [list(range(6, 70)), list(range(20, 55)), [9]]


def layerwise(tiny: Tiny, dtype: torch.dtype = torch.float32) -> LayerwiseModel:
    trio = open_trio(tiny.config(), LoadOptions())
    return LayerwiseModel.open(trio.reasoning, trio.config, dtype, "cpu")


@contextmanager
def layer_outputs(model: Any) -> Iterator[dict[int, Tensor]]:
    """Hidden states (T, d) after each layer of the forward pass inside."""
    found: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            found[index] = (output[0] if isinstance(output, tuple) else output)[0]

        return hook

    handles = [
        layer.register_forward_hook(keep(index)) for index, layer in enumerate(model.model.layers)
    ]
    yield found
    for handle in handles:
        handle.remove()


@contextmanager
def counted_layers() -> Iterator[Counter[tuple[int, bytes]]]:
    """Passes of every decoder layer of any model, by (layer, digest of its input)."""
    passes: Counter[tuple[int, bytes]] = Counter()

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        if type(module).__name__.endswith("DecoderLayer"):
            index = module.self_attn.layer_idx
            passes[index, args[0].numpy().tobytes()] += 1

    handle = nn_module.register_module_forward_pre_hook(count)
    try:
        yield passes
    finally:
        handle.remove()


@pytest.mark.parametrize("shard", [None, "60KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_equal_the_whole_model_bit_for_bit(
    tmp_path: Path, family: str, dtype: torch.dtype, shard: str | None
) -> None:
    changes = {"sliding_window": 9} if family == "mistral" else {}
    tiny = Tiny.make(tmp_path, family, dtype, shard=shard, **changes)
    assert (len(list((tmp_path / "reasoning").glob("*.safetensors"))) > 1) == (shard is not None)
    streamed = layerwise(tiny, dtype)
    model = tiny.model(dtype=dtype, attn_implementation="sdpa")
    for ids, (hidden, calls) in zip(SAMPLES, list(streamed.record(SAMPLES)), strict=True):
        with layer_outputs(model) as expected, torch.no_grad():
            model(input_ids=torch.tensor([ids]))
        current = hidden
        for index in range(len(model.model.layers)):
            with streamed.layer(index) as layer:
                current = run_layer(layer, current, calls[index])
            check_equal(current, expected[index], model.config)


def check_equal(found: Tensor, expected: Tensor, config: Any) -> None:
    """Bit for bit, but where the whole model shares heads in another kernel than the streamed one.

    That is so in older releases of torch, whose kernel for it holds T x T scores.
    """
    if attention._TORCH >= (2, 13) or config.num_key_value_heads == config.num_attention_heads:
        assert torch.equal(found, expected)
    else:
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert error < 8 * torch.finfo(found.dtype).eps


def test_only_the_layer_at_hand_holds_weights(tmp_path: Path) -> None:
    streamed = layerwise(Tiny.make(tmp_path, "qwen2"))
    list(streamed.record(SAMPLES))

    def filled() -> set[str]:
        parameters = streamed.model.named_parameters()
        return {".".join(name.split(".")[:3]) for name, value in parameters if not value.is_meta}

    assert filled() == set()
    with streamed.layer(1):
        assert filled() == {"model.layers.1"}
    assert filled() == set()


def test_a_failure_inside_a_layer_empties_it_again(tmp_path: Path) -> None:
    streamed = layerwise(Tiny.make(tmp_path, "llama"))
    with pytest.raises(KeyError), streamed.layer(0):
        raise KeyError
    assert all(value.is_meta for value in streamed.model.parameters())


def test_shorter_samples_share_the_longest_ones_tables(tmp_path: Path) -> None:
    streamed = layerwise(Tiny.make(tmp_path, "qwen2"))
    tables = [calls[0].kwargs["position_embeddings"][0] for _, calls in streamed.record(SAMPLES)]
    assert tables[1].untyped_storage().data_ptr() == tables[0].untyped_storage().data_ptr()
    assert tables[1].shape[1] == len(SAMPLES[1])


def test_sites_are_found_on_the_first_pass_and_rows_are_what_the_modules_received(
    tmp_path: Path,
) -> None:
    tiny = Tiny.make(tmp_path, "qwen3")
    streamed = layerwise(tiny)
    recorded = list(streamed.record(SAMPLES))
    for index in range(2):
        sites = SiteMap()
        with streamed.layer(index) as layer:
            for sample, (hidden, calls) in enumerate(recorded):
                rows: dict[str, Tensor] = {}

                def pick(
                    site: str, inputs: Tensor, tokens: Tensor | None, into: Any = rows
                ) -> None:
                    assert tokens is None
                    into[site] = inputs

                size = partial(len, hidden)
                with capture_inputs(layer, sites, pick, size), linear_inputs(layer) as seen:
                    output = run_layer(layer, hidden, calls[index])
                recorded[sample] = (output, calls)
                assert set(rows) == set(SITES)
                for site, members in SITES.items():
                    found = [weight.name for weight, _ in sites.members(site)]
                    assert found == [f"{member}.weight" for member in members]
                    assert all(torch.equal(rows[site], seen[member]) for member in members)


@pytest.mark.parametrize(
    ("settings", "per_layer"),
    [
        ({"projection": "orthogonal", "coefficients": "off"}, 3),
        ({"projection": "orthogonal", "coefficients": "normalized"}, 3 + 3),
        ({"projection": "oblique", "coefficients": "off"}, 3 + 3),
        ({"projection": "oblique", "coefficients": "closed_form"}, 3 + 2 * 3),
    ],
)
def test_each_sample_passes_each_layer_once_per_purpose(
    tmp_path: Path, settings: dict[str, str], per_layer: int
) -> None:
    tiny = Tiny.make(tmp_path, "qwen2", num_hidden_layers=3).using(**settings)
    with counted_layers() as passes:
        summary = tiny.calibrate()
    # Two other models read the instruction set's three samples, for the hint at swapped roles.
    hints = 2 if per_layer > 3 else 0
    for layer in range(3):
        mine = {key: count for key, count in passes.items() if key[0] == layer}
        assert sum(mine.values()) == per_layer + 3 * hints
        # a sample of several streams enters the first layer alike, later ones differ
        most = 2 if settings == {"projection": "oblique", "coefficients": "closed_form"} else 1
        assert max(mine.values()) <= most + (hints if layer == 0 else 0)
    assert sum(summary.layer_passes.values()) == 3 * per_layer


def test_features_that_overflow_name_layer_and_sample(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "llama")
    model = tiny.model(dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(3e38)
    model.save_pretrained(tiny.folder / "reasoning")
    tiny = tiny.using(projection="orthogonal")
    with pytest.raises(
        RainError, match=r"model\.layers\.1\.self_attn\.q_proj: .*reasoning\.jsonl:1 .*NaN or Inf"
    ):
        tiny.calibrate()
    assert not tiny.path.exists()
    assert not list(tmp_path.glob("*.work"))


def test_attention_that_overflows_in_the_merged_model_names_layer_and_sample(
    tmp_path: Path,
) -> None:
    """The reasoning model is fine, but with this task vector the scores are infinite."""
    tiny = Tiny.make(tmp_path, "llama")
    model = tiny.model("instruct", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1e38)
    model.save_pretrained(tiny.folder / "instruct")
    accept = ["large_task_vector", "no_thinking"]
    tiny = tiny.using(projection="orthogonal", coefficients="closed_form", accept=accept)
    with pytest.raises(RainError, match=r"model\.layers\.0: .*instruction\.jsonl:1.*NaN or Inf"):
        tiny.calibrate()


def test_a_tensor_of_another_shape_than_the_config_says_is_named(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "llama")
    config = tiny.folder / "reasoning" / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 400', '"vocab_size": 401'))
    with pytest.raises(RainError, match=r"embed_tokens.weight has shape \(400, 48\).*\(401, 48\)"):
        tiny.calibrate()


def test_dense_reference_sees_more_than_zeros(tmp_path: Path) -> None:
    """The reference itself: its window reaches the instructions, its statistics are not trivial."""
    dense = Dense(Tiny.make(tmp_path, "mistral").using(rank_by="energy", rank_share=0.9))
    for alignment, leakage in dense.statistics:
        assert float(alignment.max()) > 0.01
        assert float(leakage.max()) > 0.01
        assert float(alignment.std()) > 0
