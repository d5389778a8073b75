"""Checkpoints as people publish them: the result is the reasoning model's folder, other weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import folder_table
import model_hub
import pytest
import torch
import yaml
from architectures import make
from commands import run, succeed
from merging import merge
from published import (
    CHECKPOINTS,
    ROLES,
    add_tensors,
    check_folder,
    published,
    unknown_tensors,
)
from tiny import Tiny, read_weights

from rain_mergekit.models.config_file import read_config_file


@pytest.mark.parametrize(("family", "dialect"), CHECKPOINTS)
def test_result_is_the_reasoning_folder_at_lambda_zero(
    tmp_path: Path, family: str, dialect: str
) -> None:
    """By our command, and by mergekit-yaml with `finish` after it."""
    tiny, config = published(tmp_path, family, dialect, **{"lambda": 0.0})
    said = succeed("merge", config, tmp_path / "ours")
    assert all(name in said for name in unknown_tensors())
    check_folder(tmp_path / "reasoning", tmp_path / "ours")
    content = yaml.safe_load(config.read_text())
    out = merge(tmp_path / "stock", content).folder
    assert read_weights(out).keys() != read_weights(tmp_path / "reasoning").keys()
    assert "Finished" in succeed("finish", out)
    check_folder(tmp_path / "reasoning", out)
    assert "Nothing to change" in succeed("finish", out)
    assert tiny.path.exists()


def test_merged_experts_are_stored_as_in_the_checkpoint(tmp_path: Path) -> None:
    """One tensor for each expert, merged: the numbers are those of transformers' module."""
    tiny, config = published(tmp_path, "deepseek_v3")
    succeed("merge", config, tmp_path / "out")
    own, merged = read_weights(tmp_path / "reasoning"), read_weights(tmp_path / "out")
    assert merged.keys() == own.keys()
    names = [name for name in own if ".experts." in name and "shared" not in name]
    instruct, pretrained = tiny.weights("instruct"), tiny.weights("pretrained")
    assert len(names) == 12
    for name in names:
        change, task = merged[name] - own[name], instruct[name] - pretrained[name]
        assert change.norm() > 0
        # a projection of the task vector: of it, and of no other expert's, much is there
        assert (change * task).sum() > 0.1 * task.square().sum(), name


@pytest.mark.parametrize(("family", "dialect"), CHECKPOINTS)
def test_pickled_result_takes_the_place_of_safetensors(
    tmp_path: Path, family: str, dialect: str
) -> None:
    """Loaders prefer safetensors: an earlier merge's must not stay. Additions are pickled too."""
    _, config = published(tmp_path, family, dialect)
    succeed("merge", config, tmp_path / "out")
    content = yaml.safe_load(config.read_text())
    content["parameters"]["lambda"] = 0.0
    config.write_text(yaml.safe_dump(content))
    succeed("merge", config, tmp_path / "out", "--no-safe-serialization")
    assert not list((tmp_path / "out").glob("*.safetensors*"))
    found: dict[str, torch.Tensor] = {}
    for path in sorted((tmp_path / "out").glob("*.bin")):
        found |= torch.load(path, weights_only=True)
    own = read_weights(tmp_path / "reasoning")
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in own.items())
    index = json.loads((tmp_path / "out" / "pytorch_model.bin.index.json").read_text())
    assert index["weight_map"].keys() == own.keys()
    succeed("merge", config, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin*"))


def test_experts_that_are_stored_with_their_axes_exchanged(tmp_path: Path) -> None:
    """Qwen3-VL with experts, as transformers 4 stores it: merged as it is stored, to the same."""
    merged: list[dict[str, torch.Tensor]] = []
    for folder in (tmp_path / "as built", tmp_path / "exchanged"):
        tiny = make(folder, "qwen3_vl_moe").using(rank_by="energy", rank_share=0.9)
        for role in ROLES if folder.name == "exchanged" else ():
            weights = tiny.weights(role)
            turned = {n: w.mT.contiguous() for n, w in weights.items() if "experts.down" in n}
            assert len(turned) == 2
            add_tensors(folder / role, **turned)
        tiny.config()
        succeed("merge", tiny.path.with_suffix(".yml"), folder / "out")
        merged.append(read_weights(folder / "out"))
    straight, exchanged = merged
    assert straight.keys() == exchanged.keys()
    for name, tensor in exchanged.items():
        own = tensor.mT if "experts.down" in name else tensor
        torch.testing.assert_close(own, straight[name], rtol=1e-5, atol=1e-6)


def test_what_the_folder_holds_is_documented(tmp_path: Path) -> None:
    """Every kind of file beside the weights, after stock mergekit and after our command."""
    table = folder_table.HEAD + "".join(folder_table.rows(tmp_path))
    page = folder_table.PAGE.read_text(encoding="utf-8")
    assert table in page, "run: python tests/support/folder_table.py"


def test_head_that_is_the_embedding_and_stored_all_the_same(tmp_path: Path) -> None:
    """Some publishers store it twice; the result does, too."""
    tiny = Tiny.make(tmp_path, "qwen2", tie_word_embeddings=True, num_hidden_layers=1)
    for role in ROLES:
        weights = tiny.weights(role)
        assert "lm_head.weight" not in weights
        add_tensors(tmp_path / role, **{"lm_head.weight": weights["model.embed_tokens.weight"]})
    tiny.config(parameters={"calibration": str(tiny.path), "lambda": 0.0})
    succeed("merge", tiny.path.with_suffix(".yml"), tmp_path / "out")
    own, merged = tiny.weights("reasoning"), read_weights(tmp_path / "out")
    assert merged.keys() == own.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in own.items())


@pytest.mark.parametrize("option", ["--safe-serialization", "--no-safe-serialization"])
@pytest.mark.parametrize("name", ["model.norm.weight", "mtp.norm.weight"])
@pytest.mark.parametrize(("family", "dialect"), CHECKPOINTS)
def test_infinity_in_the_type_of_the_result(
    tmp_path: Path, family: str, dialect: str, name: str, option: str
) -> None:
    """Found in both formats of the weights, among what is added too: nothing is written."""
    tiny, config = published(tmp_path, family, dialect)
    added = name.startswith("mtp.")  # keeps its type
    large = torch.full_like(tiny.weights("reasoning")[name], float("inf") if added else 1e6)
    add_tensors(tmp_path / "reasoning", **{name: large})
    content = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**content, "out_dtype": "float16"}))
    outcome = run("merge", config, tmp_path / "out", option)
    assert outcome.code == 1
    where = "the result" if added else "the result in float16"
    assert f"{name} holds NaN or infinite values in {where}" in outcome.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "dialect"), CHECKPOINTS)
def test_names_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dialect: str
) -> None:
    """All that belongs to the model is fetched; code where it may run."""
    _, config = published(tmp_path, family, dialect, **{"lambda": 0.0})
    text = config.read_text()
    # mergekit remembers in this process what it has opened by which name
    names = {f"{family}-{dialect[-1]}/{role}": tmp_path / role for role in ROLES}
    for name, folder in names.items():
        assert f"{folder}\n" in text
        text = text.replace(f"{folder}\n", f"{name}\n")
    config.write_text(text)
    with model_hub.hub(names) as found:
        model_hub.use(found, monkeypatch, tmp_path / "cache")
        for name, options in (("plain", ()), ("trusted", ("--trust-remote-code",))):
            succeed("merge", config, tmp_path / name, *options)
    check_folder(tmp_path / "reasoning", tmp_path / "trusted")
    code = "reasoning_parser.py"
    assert not (tmp_path / "plain" / code).exists()
    shutil.copy(tmp_path / "reasoning" / code, tmp_path / "plain")
    check_folder(tmp_path / "reasoning", tmp_path / "plain")


@pytest.mark.parametrize(("family", "dialect"), CHECKPOINTS)
def test_type_in_other_spellings(tmp_path: Path, family: str, dialect: str) -> None:
    """The config says it in the field that the checkpoint has for it."""
    _, config = published(tmp_path, family, dialect)
    content = yaml.safe_load(config.read_text())
    spelling = {"olmo2": "bf16", "mixtral": "torch.bfloat16"}.get(family, "bfloat16")
    config.write_text(yaml.safe_dump({**content, "dtype": spelling}))
    succeed("merge", config, tmp_path / "out")
    field = {"transformers 4": "torch_dtype", "transformers 5": "dtype"}[dialect]
    before = read_config_file(tmp_path / "reasoning")
    assert read_config_file(tmp_path / "out") == {**before, field: "bfloat16"}
    weights = read_weights(tmp_path / "out")
    known = weights.keys() - unknown_tensors().keys()
    assert {weights[name].dtype for name in known} == {torch.bfloat16}


@pytest.mark.parametrize(("family", "dialect"), CHECKPOINTS)
def test_config_of_another_vocabulary(tmp_path: Path, family: str, dialect: str) -> None:
    """mergekit drops rows of padding; of the config the size alone follows."""
    tiny, config = published(tmp_path, family, dialect)
    content = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**content, "tokenizer": {"source": "base"}}))
    succeed("merge", config, tmp_path / "out")
    rows = read_weights(tmp_path / "out")["model.embed_tokens.weight"].shape[0]
    before = read_config_file(tmp_path / "reasoning")
    assert rows == len(tiny.tokenizer()) < before["vocab_size"]
    assert read_config_file(tmp_path / "out") == {**before, "vocab_size": rows}


@pytest.mark.parametrize(("family", "dialect"), CHECKPOINTS)
def test_quantised_embedding_is_refused(tmp_path: Path, family: str, dialect: str) -> None:
    """It is copied, and converting it without its scales would give nonsense."""
    _, config = published(tmp_path, family, dialect)
    folder, name = tmp_path / "reasoning", "model.embed_tokens.weight"
    add_tensors(folder, **{name: read_weights(folder)[name].to(torch.float8_e4m3fn)})
    outcome = run("calibrate", config)
    assert outcome.code == 1
    assert f"reasoning: {name} is stored as F8_E4M3, expected a plain weight" in outcome.output
