"""Drift, generation and the taking apart of answers, against independent computations."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TRIO, make_models, refused, run, succeed
from dense import divergence, means, whole
from hypothesis import given
from hypothesis import strategies as st
from mergekit.common import ModelReference
from safetensors.torch import load_file, save_file
from scipy.special import rel_entr, softmax
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

from rain_mergekit.capture import next_tokens
from rain_mergekit.capture.next_tokens import kl_divergence
from rain_mergekit.errors import RainError
from rain_mergekit.evaluation.divergence import Drift, Place
from rain_mergekit.evaluation.divergence_meter import DivergenceMeter
from rain_mergekit.evaluation.layerwise_drift import VerifyOptions
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.generation import generate, load_model
from rain_mergekit.models.loading import LoadOptions
from rain_mergekit.models.tokenizer import load_tokenizer
from rain_mergekit.text.calibration_sets import load_reasoning
from rain_mergekit.text.markers import Markers
from rain_mergekit.text.thinking_blocks import split_thinking
from rain_mergekit.text.token_positions import ReasoningTokens


def checkpoint(path: Path) -> Checkpoint:
    return Checkpoint.open(ModelReference.model_validate({"model": {"path": str(path)}}))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(checkpoint(TRIO / "reasoning"))


@pytest.fixture(scope="module")
def reasoning() -> Qwen2ForCausalLM:
    return load_model(checkpoint(TRIO / "reasoning"), "cpu", None)


@pytest.fixture(scope="module")
def instruct() -> Qwen2ForCausalLM:
    return load_model(checkpoint(TRIO / "instruct"), "cpu", None)


@pytest.fixture(scope="module")
def samples(tokenizer: PreTrainedTokenizerBase) -> tuple[ReasoningTokens, ...]:
    return load_reasoning(TRIO / "reasoning.jsonl", tokenizer, keep_response=True).samples[:5]


def meter(
    samples: tuple[ReasoningTokens, ...], reference: Path = TRIO / "reasoning", **how: Any
) -> DivergenceMeter:
    return DivergenceMeter.of(checkpoint(reference), samples, VerifyOptions(LoadOptions(), **how))


# KL divergence


def test_kl_divergence_equals_scipy() -> None:
    wanted, found = torch.randn(7, 50) * 3, torch.randn(7, 50) * 3
    p, q = (softmax(x.double().numpy(), axis=-1) for x in (wanted, found))
    expected = rel_entr(p, q).sum(-1)
    assert kl_divergence(wanted, found).numpy() == pytest.approx(expected, rel=1e-5)


def test_kl_divergence_ignores_what_the_reference_never_says() -> None:
    wanted = torch.tensor([[0.0, 1.0, -math.inf]])
    assert kl_divergence(wanted, wanted).item() == pytest.approx(0.0, abs=1e-6)
    found = torch.tensor([[0.0, -math.inf, 0.0]])
    assert kl_divergence(wanted, found).item() == math.inf


@given(st.integers(0, 10_000))
def test_kl_divergence_is_not_negative_and_zero_for_equals(seed: int) -> None:
    torch.manual_seed(seed)
    wanted, found = torch.randn(2, 9) * 5, torch.randn(2, 9) * 5
    assert bool((kl_divergence(wanted, found) > 0).all())
    assert kl_divergence(wanted, wanted + 3).abs().max().item() < 1e-5


@pytest.mark.parametrize("numbers", [739 * 1000, 739 * 16, 1])
def test_chunks_equal_one_dense_forward_pass(
    samples: tuple[ReasoningTokens, ...], numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_tokens, "CHUNK_LOGITS", numbers)
    ids = samples[0].input_ids
    assert len(ids) > 48  # at the smallest size several chunks
    with meter(samples[:1], dtype=torch.float64) as measuring:
        (found,) = measuring.divergences(checkpoint(TRIO / "instruct"))
    expected = divergence(whole(TRIO / "reasoning"), whole(TRIO / "instruct"), ids)
    assert found.numpy() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("role", ["instruct", "pretrained"])
def test_places_are_means_over_their_positions(
    samples: tuple[ReasoningTokens, ...], role: str
) -> None:
    """Of layers that run one after the other as of whole models: the same to the sixth digit."""
    with meter(samples, dtype=torch.float64) as measuring:
        found = measuring.drift(checkpoint(TRIO / role))
    expected = means(whole(TRIO / "reasoning"), whole(TRIO / role), samples)
    for name in ("think", "content", "rest"):
        place: Place = getattr(found, name)
        assert place.positions == expected.positions[name]
        assert place.mean == pytest.approx(expected.mean[name], rel=1e-6)
    assert found.worst_source == expected.worst_source
    assert found.worst == pytest.approx(expected.worst, rel=1e-6)
    assert found.samples == len(samples)
    assert found.verdict == "damaged"


def test_one_reference_measures_several_models(samples: tuple[ReasoningTokens, ...]) -> None:
    """One after the other, with hidden states on disk: as each of them alone."""
    alone = []
    for role in ("instruct", "pretrained"):
        with meter(samples) as measuring:
            alone.append(measuring.drift(checkpoint(TRIO / role)))
    with meter(samples, budget=0) as measuring:
        found = [measuring.drift(checkpoint(TRIO / role)) for role in ("instruct", "pretrained")]
    assert found == alone


def test_a_model_does_not_drift_from_itself(samples: tuple[ReasoningTokens, ...]) -> None:
    seen: list[int] = []
    with meter(samples) as measuring:
        found = measuring.drift(checkpoint(TRIO / "reasoning"), seen.append)
    assert (found.think.mean, found.content.mean, found.rest.mean) == (0.0, 0.0, 0.0)
    assert found.verdict == "kept"
    assert seen == 4 * [len(sample.input_ids) for sample in samples]  # its layers


def test_a_model_that_overflows_is_damaged(
    samples: tuple[ReasoningTokens, ...], tmp_path: Path
) -> None:
    folder = make_models(tmp_path) / "reasoning"
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(1e38)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with meter(samples[:2]) as measuring:
        found = measuring.drift(checkpoint(folder))
    assert math.isnan(found.think.mean)
    assert math.isnan(found.worst)
    assert found.verdict == "damaged"


@pytest.mark.parametrize(
    ("mean", "verdict"),
    [(0.0, "kept"), (0.01, "kept"), (0.02, "at risk"), (0.06, "damaged"), (math.inf, "damaged")],
)
def test_verdicts(mean: float, verdict: str) -> None:
    place = Place(mean, 10)
    assert Drift(place, place, place, 1, "x", 0.0).verdict == verdict


def test_nothing_to_compare() -> None:
    with pytest.raises(RainError, match="no samples"):
        meter(())


def test_tokens_that_one_model_lacks_do_not_count(
    samples: tuple[ReasoningTokens, ...], tmp_path: Path
) -> None:
    """As mergekit pads or cuts the vocabulary."""
    padded = tmp_path / "padded"
    shutil.copytree(TRIO / "reasoning", padded)
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps({**config, "vocab_size": 760}))
    weights = load_file(padded / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    more = torch.ones(760 - len(table), table.shape[1], dtype=table.dtype)
    weights["model.embed_tokens.weight"] = torch.cat([table, more])
    save_file(weights, padded / "model.safetensors", metadata={"format": "pt"})
    for pair in ((TRIO / "reasoning", padded), (padded, TRIO / "reasoning")):
        with meter(samples, reference=pair[0]) as measuring:
            assert measuring.drift(checkpoint(pair[1])).think.mean == pytest.approx(0.0, abs=1e-6)


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    folder = make_models(tmp_path) / "reasoning"
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RainError, match=r"weights are missing \(1\), such as model\.layers\.0\.m"):
        load_model(checkpoint(folder), "cpu", None)
    (folder / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(RainError, match="cannot read its config"):
        load_model(checkpoint(folder), "cpu", None)


def test_type_of_the_model() -> None:
    found = checkpoint(TRIO / "instruct")
    assert load_model(found, "cpu", None).dtype == torch.float32
    assert load_model(found, "cpu", torch.bfloat16).dtype == torch.bfloat16


# Generation


def prompts(count: int) -> list[str]:
    lines = (TRIO / "test.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[:count]]


def greedy(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, limit: int
) -> str:
    """One prompt, one token at a time, no cache, no padding."""
    text = f"<|im_start|>user\n {prompt}<|im_end|>\n<|im_start|>assistant\n"
    start = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = list(start)
    with torch.no_grad():
        while len(ids) < len(start) + limit:
            token = int(
                model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()
            )
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
    return str(tokenizer.decode(ids[len(start) :]))


def test_batches_equal_one_token_at_a_time(
    reasoning: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    asked = prompts(5)
    done: list[int] = []
    answers = generate(
        reasoning, tokenizer, asked, max_new_tokens=80, batch_size=2, tick=done.append
    )
    assert [answer.prompt for answer in answers] == asked
    expected = [greedy(reasoning, tokenizer, prompt, 80) for prompt in asked]
    assert [answer.text for answer in answers] == expected
    assert all(answer.finished and answer.thought.complete for answer in answers)
    assert done == [2, 2, 1]


def test_token_limit(reasoning: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    (answer,) = generate(reasoning, tokenizer, prompts(1), max_new_tokens=9)
    assert not answer.finished
    assert (answer.thought.opened, answer.thought.closed) == (True, False)
    assert answer.thought.response == ""


def test_instruct_model_does_not_think(
    instruct: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    (answer,) = generate(instruct, tokenizer, prompts(1), max_new_tokens=40)
    assert not answer.thought.opened
    assert answer.thought.response.startswith("answer :")


def test_template_that_opens_the_block(
    reasoning: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    opening = load_tokenizer(checkpoint(TRIO / "reasoning"))
    opening.chat_template = str(tokenizer.chat_template).replace(
        "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"
    )
    (plain,) = generate(reasoning, tokenizer, prompts(1), max_new_tokens=80)
    (opened,) = generate(reasoning, opening, prompts(1), max_new_tokens=80)
    assert not opened.text.startswith("<think>")
    assert opened.thought == plain.thought


def test_template_that_is_told_to_open_the_block(
    reasoning: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    told = load_tokenizer(checkpoint(TRIO / "reasoning"))
    told.chat_template = str(tokenizer.chat_template).replace(
        "<|im_start|>assistant\n", "<|im_start|>assistant\n{% if think %}<think>\n{% endif %}"
    )
    for options in ({}, {"think": True}):
        (answer,) = generate(
            reasoning, told, prompts(1), max_new_tokens=80, chat_template_kwargs=options
        )
        assert answer.text.startswith("<think>") == (not options)
        assert answer.thought.complete


def test_other_markers(reasoning: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    (answer,) = generate(
        reasoning, tokenizer, prompts(1), max_new_tokens=80, markers=Markers("<a>", "</a>")
    )
    assert not answer.thought.opened


def test_no_chat_template(reasoning: Qwen2ForCausalLM) -> None:
    bare = load_tokenizer(checkpoint(TRIO / "reasoning"))
    bare.chat_template = None
    with pytest.raises(RainError, match="has no chat template"):
        generate(reasoning, bare, prompts(1), max_new_tokens=4)


# Taking an answer apart


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>\na b\n</think>\n\nc d", False, (True, True, "a b", "c d", True)),
        ("  <think>a</think>c", False, (True, True, "a", "c", True)),
        ("a</think>c", True, (True, True, "a", "c", True)),
        ("<think>a</think>c", True, (True, True, "a", "c", True)),
        ("<think>a", False, (True, False, "a", "", False)),
        ("a", True, (True, False, "a", "", False)),
        ("<think></think>c", False, (True, True, "", "c", False)),
        ("c", False, (False, False, "", "c", False)),
        ("c</think>d", False, (False, True, "", "c</think>d", False)),
        ("c <think>a</think>d", False, (False, True, "", "c <think>a</think>d", False)),
        ("", False, (False, False, "", "", False)),
    ],
)
def test_split(text: str, opened: bool, expected: tuple[object, ...]) -> None:
    found = split_thinking(text, Markers(), opened_by_template=opened)
    parts = (found.opened, found.closed, found.thinking, found.response, found.complete)
    assert parts == expected


# mergekit-rain verify

DATA = TRIO / "reasoning.jsonl"


def verify(merged: Path, *options: object) -> tuple[object, ...]:
    return ("verify", merged, "--against", TRIO / "reasoning", "--reasoning-data", DATA, *options)


def test_verify_of_the_same_model() -> None:
    said = succeed(*verify(TRIO / "reasoning", "--samples", 4))
    assert "4 samples" in said
    assert "L_think  0 " in said
    assert "Verdict: the thinking format is kept" in said


def test_verify_of_a_model_that_lost_its_thinking() -> None:
    outcome = run(*verify(TRIO / "instruct", "--samples", 4))
    assert outcome.code == 3
    assert "Verdict: the thinking format is damaged" in outcome.output


def test_verify_tells_what_it_skips() -> None:
    said = succeed(*verify(TRIO / "reasoning", "--max-tokens", 70, "--samples", 2, "--window", 0))
    assert said.count("Warning:") == 1
    assert "samples skipped, the first" in said
    assert "more than max_tokens = 70" in said


def test_verify_bad_input(tmp_path: Path) -> None:
    assert "nowhere" in refused(tmp_path, *verify(tmp_path / "nowhere"))
    options = ("--markers", "<a>", "</a>")
    assert "none of its 112 samples" in refused(tmp_path, *verify(TRIO / "instruct", *options))
    if not torch.cuda.is_available():
        message = refused(tmp_path, *verify(TRIO / "instruct", "--device", "cuda:1"))
        assert "sees no such device" in message
