"""Head layouts of the supported families, against the shapes of their real modules."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, MODULES, model_config
from transformers import AutoConfig, AutoModelForCausalLM

from rain_mergekit.errors import RainError
from rain_mergekit.modules import head_layout


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_module_of_a_layer_is_known_and_its_scales_fit(family: str) -> None:
    model = AutoModelForCausalLM.from_config(model_config(family, num_hidden_layers=1))
    layer = model.model.layers[0]
    linear = {n for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
    layout = head_layout(model.config)
    assert linear == set(layout.kinds) == set(MODULES)
    alpha = torch.rand(layout.heads, dtype=torch.float64)
    for module in MODULES:
        shape = tuple(layer.get_submodule(module).weight.shape)
        scale = layout.scales(module, alpha, shape)
        assert scale.rows is None or scale.rows.shape == (shape[0],)
        assert scale.cols is None or scale.cols.shape == (shape[1],)
        assert (scale.rows is None) != (scale.cols is None)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_is_the_one_that_attention_itself_uses(family: str) -> None:
    """A query head is cut out of the real model: only its rows and columns may matter to it."""
    torch.manual_seed(3)
    config = model_config(family, num_hidden_layers=1, attn_implementation="eager")
    attention = AutoModelForCausalLM.from_config(config).model.layers[0].self_attn
    layout = head_layout(config)
    group = layout.heads // layout.kv_heads
    for head in range(layout.heads):
        alpha = torch.zeros(layout.heads, dtype=torch.float64)
        alpha[head] = 1.0
        rows = layout.scales("self_attn.q_proj", alpha, tuple(attention.q_proj.weight.shape)).rows
        shape = tuple(attention.k_proj.weight.shape)
        shared = layout.scales("self_attn.k_proj", alpha, shape).rows
        assert rows is not None
        assert shared is not None
        before = _head_weights(attention, config)
        with torch.no_grad():
            for proj, vector in ((attention.q_proj, rows), (attention.k_proj, shared)):
                saved = proj.weight.clone()
                proj.weight += torch.randn_like(proj.weight) * (vector != 0)[:, None]
                changed = (_head_weights(attention, config) - before).abs().amax((1, 2)) > 1e-7
                sharing = [h for h in range(layout.heads) if h // group == head // group]
                expected = [head] if proj is attention.q_proj else sharing
                assert changed.nonzero().flatten().tolist() == expected
                proj.weight.copy_(saved)


def _head_weights(attention: torch.nn.Module, config: AutoConfig) -> torch.Tensor:
    """Eager attention probabilities (heads, T, T) of one fixed input."""
    hidden = torch.randn(1, 6, config.hidden_size, generator=torch.Generator().manual_seed(1))
    size = attention.head_dim
    tables = (torch.ones(1, 6, size), torch.zeros(1, 6, size))
    with torch.no_grad():
        _, weights = attention(hidden, position_embeddings=tables, attention_mask=None)
    assert weights is not None
    return weights[0]


def test_layer_modules_share_the_mean_of_their_heads() -> None:
    layout = head_layout(model_config("qwen2"))
    alpha = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
    for module in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        scale = layout.scales(module, alpha, (3, 7))
        assert scale.rows is not None
        assert scale.rows.tolist() == [1.25] * 3
    columns = layout.scales("self_attn.o_proj", alpha, (48, 48)).cols
    assert columns is not None
    assert columns.tolist() == [a for a in alpha.tolist() for _ in range(12)]


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral", "phi3"])
def test_other_architectures_are_refused_by_name(family: str) -> None:
    with pytest.raises(RainError, match=rf"'{family}' is not supported .* llama, mistral, qwen2"):
        head_layout(AutoConfig.for_model(family))
