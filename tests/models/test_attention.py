"""The observed attention against transformers' eager attention, and its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import INDEXED, family_config
from tiny import FAMILIES, model_config, random_weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM

from rain_mergekit.capture.attention_statistics import AttentionStatistics
from rain_mergekit.models import attention
from rain_mergekit.models.attention import AttentionCall, observe_attention
from rain_mergekit.text.token_positions import InstructionTokens, SpanPositions

LENGTH = 40
SPECIAL: dict[str, Any] = {
    # softcap on the scores, and windows in every other layer
    "gemma2": {
        "model_type": "gemma2",
        "num_key_value_heads": 2,
        "head_dim": 12,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 2.0,
        "sliding_window": 7,
    },
    # attention sinks
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_key_value_heads": 2,
        "head_dim": 12,
        "sliding_window": 7,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    # windows in the upper layers only
    "qwen2-mixed": {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
    },
}


def build(family: str, implementation: str, **changes: Any) -> Any:
    """The same random model for each implementation."""
    attention.register()
    torch.manual_seed(5)
    if family in FAMILIES:
        config = model_config(family, **changes)
    else:
        base = model_config("llama").to_dict()
        kept = {key: base[key] for key in ("vocab_size", "hidden_size", "intermediate_size")}
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
        special = dict(SPECIAL[family])
        config = AutoConfig.for_model(special.pop("model_type"), **kept, **sizes, **special)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    random_weights(model, 0.1)
    return model.eval()


def tokens() -> Tensor:
    return torch.randint(6, 400, (1, LENGTH), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("blocks", [attention.BLOCK_BYTES, 4 * LENGTH * 4 * 3])
@pytest.mark.parametrize("family", [*FAMILIES, *SPECIAL])
def test_observed_rows_and_outputs_equal_eager_attention(
    family: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK_BYTES", blocks)
    eager, ours = build(family, "eager"), build(family, attention.NAME)
    rows: list[Tensor] = []
    chosen = torch.tensor([0, 3, 12, 25, LENGTH - 1])
    with torch.no_grad():
        expected = eager(input_ids=tokens(), output_attentions=True)
        with observe_attention(lambda call: rows.append(call.rows(chosen))):
            found = ours(input_ids=tokens())
    assert len(rows) == len(expected.attentions)
    for row, weights in zip(rows, expected.attentions, strict=True):
        torch.testing.assert_close(row, weights[0][:, chosen], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])  # 2, 1 and all heads of their own
def test_repeated_heads_give_the_same_outputs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What float32 on a GPU takes, which torch would else give T x T scores."""
    query = torch.empty(1, 4, 8, 12, device="meta")
    assert attention._needs_own_heads(query)
    assert not attention._needs_own_heads(query.bfloat16())
    old = attention._TORCH < (2, 13)
    assert attention._needs_own_heads(torch.empty_like(query, device="cpu")) == old
    monkeypatch.setattr(attention, "_needs_own_heads", lambda _: True)
    eager, ours = build(family, "eager"), build(family, attention.NAME)
    with torch.no_grad():
        expected, found = eager(input_ids=tokens()), ours(input_ids=tokens())
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_a_window_changes_the_rows() -> None:
    """Not vacuous: with the window, what lies before it has no weight."""
    rows: list[Tensor] = []
    with (
        torch.no_grad(),
        observe_attention(lambda call: rows.append(call.rows(torch.tensor([30])))),
    ):
        build("mistral", attention.NAME, sliding_window=9)(input_ids=tokens())
    for row in rows:
        assert bool((row[:, :, 22:31] > 0).all())
        assert not bool(row[:, :, :22].any())
        assert not bool(row[:, :, 31:].any())


def test_observers_end_with_their_block() -> None:
    calls: list[AttentionCall] = []
    model = build("llama", attention.NAME)
    with torch.no_grad():
        with observe_attention(calls.append):
            model(input_ids=tokens())
        model(input_ids=tokens())
    assert len(calls) == 2


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": torch.ones(2, 4, dtype=torch.long)},
        {
            "input_ids": torch.ones(1, 4, dtype=torch.long),
            "attention_mask": torch.tensor([[0, 1, 1, 1]]),
        },
    ],
)
def test_batches_and_padding_are_refused_rather_than_ignored(inputs: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="one unpadded, uncached sample"):
        build("llama", attention.NAME)(**inputs)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation puts out (views of weights included)."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.bytes, self.operation = 0, 0, ""

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes() > self.bytes:
                self.elements, self.operation = leaf.numel(), str(func)
                self.bytes = leaf.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize(("family", "window"), [("llama", None), ("qwen2", None), ("mistral", 500)])
def test_no_square_matrix_at_4096_tokens(
    family: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    length, heads = 4096, 4
    monkeypatch.setattr(attention, "BLOCK_BYTES", 4 * 1024 * 1024)
    changes = {} if window is None else {"sliding_window": window}
    model = build(family, attention.NAME, max_position_embeddings=length, **changes).model
    model.layers = model.layers[:1]
    model.config.num_hidden_layers = 1
    response = tuple(range(2000, 4000, 2))
    span = SpanPositions("one", tuple(range(10, 40)), response, tuple(range(2001, 4000, 2)))
    probe = AttentionStatistics(
        InstructionTokens("s", (), (), (), response, (span,)), leakage_from_thinking=False
    )
    largest = Largest()
    with torch.no_grad(), largest, observe_attention(probe):
        model(input_ids=torch.randint(6, 400, (1, length)), use_cache=False)
    assert probe.alignment is not None
    assert largest.bytes <= 4 * 1024 * 1024 * 1.01, largest.operation
    assert largest.elements * 60 < heads * length**2


def indexed(kind: str, implementation: str) -> Any:
    """A family that picks its keys itself, by scores that it masks with the mask of attention."""
    attention.register()
    torch.manual_seed(5)
    config = family_config(kind)
    model = AutoModel.from_config(config, attn_implementation=implementation)
    random_weights(model, 0.1)
    return model.eval()


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind, marks=pytest.mark.skipif(kind not in CONFIG_MAPPING, reason="a newer family")
        )
        for kind in INDEXED
    ],
)
def test_families_that_look_into_the_mask_get_it_whole(kind: str) -> None:
    """The indexer leaves all but 12 keys out: its choice is kept."""
    eager, ours = indexed(kind, "eager"), indexed(kind, attention.DENSE)
    assert attention.name_for(ours.layers) == attention.DENSE
    rows: list[Tensor] = []
    chosen = torch.tensor([0, 3, 25, LENGTH - 1])
    with torch.no_grad():
        expected = eager(input_ids=tokens(), output_attentions=True)
        with observe_attention(lambda call: rows.append(call.rows(chosen))):
            found = ours(input_ids=tokens())
    torch.testing.assert_close(
        found.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-4
    )
    assert len(rows) == len(expected.attentions) == 2
    for row, weights in zip(rows, expected.attentions, strict=True):
        assert int((row[0, -1] > 0).sum()) <= 12
        torch.testing.assert_close(row, weights[0][:, chosen], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, *SPECIAL])
def test_all_others_get_a_mask_by_function(family: str) -> None:
    assert attention.name_for(build(family, attention.NAME).base_model) == attention.NAME
