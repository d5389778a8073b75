"""Trios that are not one family's three sizes of the same: a proxy base, or other vocabularies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import run
from merging import (
    TEMPLATE,
    Calibration,
    Trio,
    check_merge,
    config,
    make_calibration,
    merge,
    merge_process,
)
from tiny import MODULES, Dense, Tiny, read_weights, unaccepted
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import calibrate
from rain_mergekit.config.merge_config import read_config
from rain_mergekit.errors import RainError

# The reasoning model stands for the pretrained one


def own_base(trio: Trio) -> Trio:
    return Trio(trio.reasoning, trio.instruct, trio.reasoning)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    torch.manual_seed(5)
    return own_base(Trio.make(tmp_path_factory.mktemp("proxy")))


@pytest.fixture(scope="module")
def calibration(proxy: Trio) -> Calibration:
    return make_calibration(proxy)


@pytest.fixture(scope="module")
def file(calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibration.write(tmp_path_factory.mktemp("file") / "proxy.rain.safetensors")


def test_merge_with_the_reasoning_model_as_base(
    proxy: Trio, calibration: Calibration, file: Path, tmp_path: Path
) -> None:
    """The ordinary YAML, in a process of its own: the same model as base_model and with a role."""
    content = config(proxy, file, parameters={"lambda": 0.7})
    assert [m["model"] for m in content["models"]] == [str(proxy.instruct), str(proxy.reasoning)]
    check_merge(merge_process(tmp_path, content).weights(), proxy, calibration, 0.7)


@pytest.mark.parametrize("listed", ["instruct alone", "base first"])
def test_other_ways_to_write_it(
    proxy: Trio, calibration: Calibration, file: Path, tmp_path: Path, listed: str
) -> None:
    content = config(proxy, file)
    instruct, base = content["models"]
    content["models"] = [instruct] if listed == "instruct alone" else [base, instruct]
    check_merge(merge(tmp_path, content).weights(), proxy, calibration, 1.0)


def test_the_role_of_the_other_model_must_fit(proxy: Trio, file: Path, tmp_path: Path) -> None:
    content = config(proxy, file)
    content["models"][0]["parameters"] = {"role": "pretrained"}
    assert "the two models are swapped" in merge(tmp_path, content).error()


def test_a_calibration_with_a_base_of_its_own_wants_it(tmp_path: Path) -> None:
    trio = Trio.make(tmp_path / "models")
    path = make_calibration(trio).write(tmp_path / "c.safetensors")
    message = merge(tmp_path / "run", config(own_base(trio), path)).error()
    assert "exactly two models" in message
    assert str(trio.pretrained) in message


def test_the_reasoning_model_is_no_instruct_model(proxy: Trio, tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    content = config(
        proxy, tmp_path / "c.safetensors", rain={"reasoning_data": "r", "fit": "projection"}
    )
    for item, role in zip(content["models"], ("pretrained", "instruct"), strict=True):
        item["parameters"] = {"role": role}
    path.write_text(json.dumps(content))
    with pytest.raises(RainError, match="base_model cannot have role instruct"):
        read_config(path)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_calibration_and_merge_with_a_proxy(tmp_path: Path, *, elsewhere: bool) -> None:
    """Eq. 16 with the stand-in as W_B, and I - H+ H of the features of the whole float64 model.

    A stand-in at another path is a pretrained model like any other.
    """
    tiny = Tiny.make(tmp_path / "tiny", "qwen3", num_hidden_layers=1)
    only = {"protect_thinking": 0.0, "reading_share": 0.0, "window": 1}
    tiny = tiny.using(rank_by="full", projection="orthogonal", **only)
    base = tiny.folder / ("pretrained" if elsewhere else "reasoning")
    listed = [
        {"model": str(tiny.folder / "instruct"), "parameters": {"role": "instruct"}},
        {"model": str(base), "parameters": {"role": "pretrained"}},
    ]
    done = calibrate(tiny.config(models=listed), RunOptions(quiet=True))
    assert any("stands for the pretrained one" in text for text in done.warnings) != elsewhere
    merged = merge(tmp_path / "run", tiny.content(models=listed)).weights()
    before, dense = tiny.weights("reasoning"), Dense(tiny)
    tuned, origin = tiny.weights("instruct"), read_weights(base)
    for module in MODULES:
        name = f"model.layers.0.{module}"
        rows = dense.rows(name, "think_positions")
        delta = tuned[f"{name}.weight"].double() - origin[f"{name}.weight"].double()
        kept = delta - delta @ torch.linalg.pinv(rows, rtol=1e-6) @ rows
        found = merged[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        torch.testing.assert_close(found, kept, rtol=0, atol=1e-4)
        assert (found @ rows.mT).norm() < 1e-4 * (delta @ rows.mT).norm()
        assert found.norm() > 0.3 * delta.norm()


# Vocabularies of different sizes

WORDS = ["[UNK]", "<|endoftext|>", "<|user|>", "<|assistant|>"]
MARKERS = ["<think>", "</think>"]
# Words of each model's tokenizer, and rows of its embeddings: some are padding.
SIZES = {
    "reasoning": (WORDS + MARKERS + [f"w{i}" for i in range(30)], 48),
    "instruct": (WORDS + [f"w{i}" for i in range(34)], 44),
    "pretrained": (WORDS + [f"w{i}" for i in range(30)], 40),
}


def make_vocabulary(folder: Path, words: list[str], rows: int, *, tied: bool) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    made = Qwen2Config(
        **sizes, **heads, vocab_size=rows, initializer_range=0.2, tie_word_embeddings=tied
    )
    Qwen2ForCausalLM(made).save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",  # noqa: S106
        eos_token="<|endoftext|>",  # noqa: S106
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


def unequal(folder: Path, *, tied: bool) -> Trio:
    torch.manual_seed(6)
    made = [make_vocabulary(folder / role, *SIZES[role], tied=tied) for role in SIZES]
    return Trio(*made)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def uneven(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trio:
    return unequal(tmp_path_factory.mktemp("uneven"), tied=request.param)


EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def test_merge_of_different_vocabularies_with_the_advised_setting(
    uneven: Trio, tmp_path: Path
) -> None:
    """Every token keeps its id, and its embedding bit for bit; the projections are merged."""
    calibration = make_calibration(uneven)
    path = calibration.write(tmp_path / "c.safetensors")
    done = merge(tmp_path / "run", config(uneven, path, tokenizer={"source": "base"}))
    found, base = done.weights(), uneven.weights("reasoning")
    used = len(SIZES["reasoning"][0])
    assert json.loads((done.folder / "config.json").read_text())["vocab_size"] == used
    for name in EMBEDDINGS:
        if name in base:
            assert torch.equal(found.pop(name), base[name][:used]), name
            found[name] = base[name]  # padding aside, as the reasoning model's
    check_merge(found, uneven, calibration, 1.0)
    AutoModelForCausalLM.from_pretrained(done.folder)
    merged = PreTrainedTokenizerFast.from_pretrained(done.folder)
    assert merged.convert_tokens_to_ids(MARKERS) == [4, 5]


def test_padding_comes_back_in_shape(uneven: Trio, tmp_path: Path) -> None:
    path = make_calibration(uneven).write(tmp_path / "c.safetensors")
    setting = {"source": "base", "pad_to_multiple_of": 16}
    found = merge(tmp_path / "run", config(uneven, path, tokenizer=setting)).weights()
    base, used = uneven.weights("reasoning"), len(SIZES["reasoning"][0])
    for name in set(EMBEDDINGS) & set(base):
        assert found[name].shape == base[name].shape
        assert torch.equal(found[name][:used], base[name][:used])


def test_without_the_setting_mergekit_refuses_and_names_it(uneven: Trio, tmp_path: Path) -> None:
    path = make_calibration(uneven).write(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"Tensor size mismatch .* tokenizer: \{source: base\}"):
        merge(tmp_path / "run", config(uneven, path))


def test_our_merge_refuses_before_the_calibration(uneven: Trio, tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    content = config(uneven, tmp_path / "c.safetensors")
    rain = {"reasoning_data": "none.jsonl", "fit": "projection", "projection": "orthogonal"}
    path.write_text(json.dumps({**content, "rain": rain}))
    done = run("merge", path, tmp_path / "merged", "--quiet")
    assert done.code == 1
    assert "add `tokenizer: {source: base}`" in done.output
    assert "reasoning [48, 32], instruct [44, 32], pretrained [40, 32]" in done.output
    path.write_text(json.dumps({**content, "rain": rain, "tokenizer": {"source": "base"}}))
    assert "cannot read the calibration set" in run("merge", path, tmp_path / "merged").output


def test_calibrate_warns_of_different_vocabularies(tmp_path: Path) -> None:
    """Rows of padding are enough: mergekit compares shapes."""
    tiny = Tiny.make(tmp_path / "tiny", "llama", num_hidden_layers=1)
    padded = AutoModelForCausalLM.from_pretrained(tiny.folder / "instruct")
    padded.resize_token_embeddings(416)
    padded.save_pretrained(tiny.folder / "instruct")
    (warning,) = unaccepted(tiny.calibrate().warnings)
    assert "lm_head.weight (reasoning [400, 48], instruct [416, 48]" in warning
    assert "`tokenizer: {source: base}`" in warning
    with_setting = tiny.config(tokenizer={"source": "base"})
    assert not unaccepted(calibrate(with_setting, RunOptions(quiet=True)).warnings)
