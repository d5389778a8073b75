"""Adapters of checkpoints as people publish them: what is merged, what counts as changed."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import run, succeed
from published import CHECKPOINTS, LEFT_BEHIND, add_adapter, change_weights, published
from safetensors.torch import load_file
from tiny import read_weights

from rain_mergekit.calibration.up_to_date import compare
from rain_mergekit.config.merge_config import read_config
from rain_mergekit.models.loading import LoadOptions

# peft and mergekit use names that transformers is about to drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
]


def with_adapters(folder: Path, family: str, dialect: str, **parameters: Any) -> Path:
    """The reasoning and the instruct model are given as base and adapter; the configuration."""
    _, config = published(folder, family, dialect, **parameters)
    content = yaml.safe_load(config.read_text())
    instruct, pretrained = content["models"]
    content["base_model"] += f"+{add_adapter(folder, 'reasoning')}"
    instruct["model"] = f"{pretrained['model']}+{add_adapter(folder, 'pretrained')}"
    content["rain"]["accept"] += ["large_task_vector"]
    config.write_text(yaml.safe_dump(content))
    return config


def merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """W + s B A, from the files alone."""
    weights, parts = read_weights(base), load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    for name in [n for n in parts if "lora_A" in n]:
        target = name.removeprefix("base_model.model.").replace("lora_A.", "")
        weights[target] = (
            weights[target] + scale * parts[name.replace("lora_A", "lora_B")] @ (parts[name])
        )
    return weights


@pytest.mark.parametrize(("family", "dialect"), CHECKPOINTS)
def test_reasoning_model_with_an_adapter(tmp_path: Path, family: str, dialect: str) -> None:
    """At lambda 0 the base's folder with the adapter in its weights, tensor by tensor."""
    config = with_adapters(tmp_path, family, dialect, **{"lambda": 0.0})
    out = tmp_path / "out"
    cache = tmp_path / "cache"
    said = succeed("calibrate", config, "--lora-merge-cache", cache)
    # DeepSeek has no table in mergekit, which then takes no reference with an adapter
    unlisted = family == "deepseek_v3"
    assert ("mergekit-yaml takes no model with an adapter" in said) == unlisted
    command = "mergekit-rain merge" if unlisted else "mergekit-yaml"
    assert f"Next: {command} {config} ./merged --lora-merge-cache {cache}" in said
    assert "is up to date" in succeed("merge", config, out, "--lora-merge-cache", cache)
    reasoning = tmp_path / "reasoning"
    wanted, found = merged(reasoning, tmp_path / "reasoning-adapter"), read_weights(out)
    assert found.keys() == wanted.keys()
    assert "mtp.fc.weight" in found
    own = read_weights(reasoning)
    assert sum(not torch.equal(own[name], wanted[name]) for name in own) == 2
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (reasoning / "config.json").read_text()
    )
    names = {p.relative_to(reasoning).as_posix() for p in reasoning.rglob("*") if p.is_file()}
    for name in names - LEFT_BEHIND.keys() - {"config.json", "model.safetensors"}:
        assert (out / name).read_bytes() == (reasoning / name).read_bytes(), name
    assert not (names & LEFT_BEHIND.keys()) - {"README.md"} & {p.name for p in out.iterdir()}
    text = (out / "README.md").read_text()
    assert "reasoning + reasoning-adapter as a base" in text
    assert str(tmp_path) not in text


def change_row(folder: Path) -> None:
    """A row that no fingerprint looks at."""
    change_weights(folder / "adapter_model.safetensors", "lora_B", lambda w: w[0].mul_(3))


def change_scale(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 16}))


def change_template(folder: Path) -> None:
    base = folder.with_name(folder.name.removesuffix("-adapter"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, folder)
    (folder / "chat_template.jinja").write_text("{# new #}" + (folder / name).read_text())


@pytest.mark.parametrize(("family", "dialect"), CHECKPOINTS)
def test_what_counts_as_changed_is_the_source(tmp_path: Path, family: str, dialect: str) -> None:
    """The adapter's files and the base's; where they lie, and the cache between, do not count."""
    config, cache = with_adapters(tmp_path, family, dialect), tmp_path / "cache"
    options = ("--lora-merge-cache", cache)
    succeed("merge", config, tmp_path / "out", *options)
    assert "is up to date" in succeed("merge", config, tmp_path / "out", *options)
    shutil.rmtree(cache)
    assert "is up to date" in succeed("merge", config, tmp_path / "out", *options)
    models = read_config(config).models
    load = LoadOptions(lora_merge_cache=str(cache))
    for role, base, changes in (
        ("reasoning", "reasoning", (change_row, change_scale, change_template)),
        ("instruct", "pretrained", (change_row,)),
    ):
        folder = tmp_path / f"{base}-adapter"
        shutil.copytree(folder, tmp_path / "kept")
        for change in changes:
            change(folder)
            found = compare(read_config(config), load).differences
            wanted = f"the adapter of the {role} model {models[role]} has changed"
            assert wanted in found, (change.__name__, found)
            assert any("tokenizer" in text for text in found) == (
                change is change_template and role == "reasoning"
            )
            shutil.rmtree(folder)
            shutil.copytree(tmp_path / "kept", folder)
        assert compare(read_config(config), load).current
        (tmp_path / "kept").rename(tmp_path / f"{role}-moved")
    elsewhere = config.read_text().replace(str(folder), str(tmp_path / "instruct-moved"))
    config.write_text(elsewhere)
    assert compare(read_config(config), load).current
    change_weights(tmp_path / "reasoning" / "model.safetensors", "o_proj", lambda w: w.mul_(2))
    found = compare(read_config(config), load).differences
    assert found == (f"the reasoning model {models['reasoning']} has changed (weights)",)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@dataclass(frozen=True)
class Messages:
    """A published trio, and what a calibration says where its instruct model is something else."""

    folder: Path
    config: Path
    content: dict[str, Any]

    def copied(self, source: Path, name: str, **files: str | None) -> Path:
        """A copy with other files; `__` stands for the dot, None removes a file."""
        folder = self.folder / name
        shutil.copytree(source, folder)
        for file, text in files.items():
            path = folder / file.replace("__", ".")
            path.unlink(missing_ok=True)
            if text is not None:
                path.write_text(text)
        return folder

    def says(self, instruct: object, *words: str, **rain: object) -> None:
        self.content["models"][0]["model"] = str(instruct)
        changed = {**self.content, "rain": {**self.content["rain"], **rain}}
        self.config.write_text(yaml.safe_dump(changed))
        cache = self.folder / "cache"
        outcome = run("calibrate", self.config, "--lora-merge-cache", cache)
        lines = [line for line in outcome.output.splitlines() if line.startswith("Error: ")]
        assert (outcome.code, len(lines)) == (1, 1), outcome.output
        assert all(word in outcome.output for word in words), outcome.output


@pytest.fixture(name="messages")
def _messages(tmp_path: Path, family: str, dialect: str) -> Messages:
    _, config = published(tmp_path, family, dialect)
    return Messages(tmp_path, config, yaml.safe_load(config.read_text()))


@pytest.mark.parametrize(("family", "dialect"), CHECKPOINTS)
def test_messages_name_a_pointer_of_git_lfs(messages: Messages) -> None:
    """In the place of weights, tokenizer, config, adapter, the model below it, or a set."""
    folder, says = messages.folder, messages.says
    pretrained, adapter = folder / "pretrained", add_adapter(folder, "pretrained")
    for number, file in enumerate(("model__safetensors", "tokenizer__json", "config__json")):
        place = messages.copied(folder / "instruct", f"pointers-{number}", **{file: LFS})
        says(place, f"{place}: {file.replace('__', '.')}: a git-lfs pointer, not the file")
    for number, file in enumerate(("adapter_model__safetensors", "adapter_config__json")):
        place = messages.copied(adapter, f"adapter-pointers-{number}", **{file: LFS})
        says(f"{pretrained}+{place}", f"the adapter: {file.replace('__', '.')}: a git-lfs pointer")
    says(f"{folder}/pointers-0+{adapter}", "model.safetensors: a git-lfs pointer")
    own = folder / "set.jsonl"
    own.write_text(LFS)
    says(folder / "instruct", "set.jsonl: a git-lfs pointer", reasoning_data=str(own))


@pytest.mark.parametrize(("family", "dialect"), CHECKPOINTS)
def test_messages_about_adapters_name_the_cause(messages: Messages) -> None:
    """One line each, before any work; headlines of other libraries stay in it."""
    folder, says, copied = messages.folder, messages.says, messages.copied
    pretrained, adapter = folder / "pretrained", add_adapter(folder, "pretrained")
    says(adapter, "is an adapter, not a model", f"as {pretrained}+{adapter}")
    own = {"config__json": (pretrained / "config.json").read_text()}
    says(copied(adapter, "with-config", **own), "is an adapter, not a model")
    says(f"{pretrained}+{folder / 'instruct'}", "what follows the + is not an adapter")
    says(f"{pretrained}+{folder / 'gone'}", "adapter not found", "there is no such folder")
    says(f"{pretrained}+acme/gone", "adapter not found", "no network, or offline mode")
    says(f"{folder / 'gone'}+{adapter}", "model not found", "there is no such folder")
    broken = copied(adapter, "broken", adapter_model__safetensors="cut")
    says(f"{pretrained}+{broken}", "cannot read the adapter or its base model", "header")
    empty = copied(adapter, "empty", adapter_model__safetensors=None)
    says(f"{pretrained}+{empty}", "the adapter has no weights")
    resized = add_adapter(folder, "pretrained", size=411, modules_to_save=["embed_tokens"])
    says(f"{pretrained}+{resized}", "the adapter does not fit its base model", "size mismatch")
    assert not list((folder / "cache").iterdir())  # else it would be taken for the merged model
    (folder / "cache").rmdir()
    (folder / "cache").write_text("a file")
    says(f"{pretrained}+{broken}", "the adapter cannot be merged into", "File exists")


@pytest.mark.parametrize(("family", "dialect"), CHECKPOINTS)
def test_messages_about_models_name_the_cause(messages: Messages) -> None:
    """No network, no folder, no weights, no GPU."""
    says, copied, pretrained = messages.says, messages.copied, messages.folder / "pretrained"
    says(messages.folder / "gone", "model not found", "there is no such folder")
    says("acme/gone", "model not found", "no network, or offline mode", "offline mode is enabled")
    says(pretrained / "model.safetensors", "is a file, expected the folder of a model")
    quantised = copied(pretrained, "gguf", model__safetensors=None, model__gguf="GGUF")
    says(quantised, "holds no weights that can be read: GGUF files alone")
    says(quantised / "model.gguf", "is a GGUF file, which is not read here: take the safetensors")
    bare = copied(pretrained, "bare", model__safetensors=None, consolidated__safetensors="x")
    says(bare, "holds no weights that can be read: expected model.safetensors", "consolidated.")
    copied(pretrained, "bare/checkpoint-500")
    says(bare, "the models are in its folders", "checkpoint-500")
    outcome = run("calibrate", messages.config, "--device", "cuda")
    assert (outcome.code, torch.cuda.is_available() or "no GPU" in outcome.output) == (1, True)
