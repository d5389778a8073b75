"""Where models come from: folders, the hub, adapters; and what is said where they do not."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import model_hub
import pytest
import torch
from commands import Workplace, make_models, make_workplace, refused, run, run_process, succeed
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rain_mergekit.calibration.up_to_date import compare
from rain_mergekit.config.merge_config import read_config
from rain_mergekit.config.type_names import type_name
from rain_mergekit.models.loading import LoadOptions
from rain_mergekit.models.side_files import side_files

# peft and mergekit use names that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def place(tmp_path: Path, models: Path) -> Workplace:
    return make_workplace(tmp_path / "place", models, samples=4)


def with_instruct(place: Workplace, name: str) -> Path:
    pretrained = {"model": str(place.model("pretrained")), "parameters": {"role": "pretrained"}}
    instruct = {"model": name, "parameters": {"role": "instruct"}}
    return place.write(models=[instruct, pretrained])


def add_adapter(place: Workplace, role: str, *, size: int | None = None, **options: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(place.model(role))
    if size is not None:
        model.resize_token_embeddings(size, mean_resizing=False)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **options)
    folder = place.folder / "adapter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(model, config).save_pretrained(folder)
    return folder


def test_pointer_of_git_lfs_is_named(place: Workplace) -> None:
    path = place.model("instruct") / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    message = refused(place.folder, "calibrate", place.yaml)
    assert "model.safetensors: a git-lfs pointer, not the file itself" in message


def test_adapter_alone_is_named(place: Workplace) -> None:
    folder = add_adapter(place, "pretrained")
    message = refused(place.folder, "calibrate", with_instruct(place, str(folder)))
    assert "is an adapter, not a model: write it after its base model" in message
    assert f"as {place.model('pretrained')}+{folder}" in message


# PEFT 0.21 warns of the very mismatch that the message is about.
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning")
def test_adapter_of_another_size_does_not_fit(place: Workplace) -> None:
    folder = add_adapter(place, "pretrained", size=741, modules_to_save=["embed_tokens"])
    cache = place.folder / "cache"
    config = with_instruct(place, f"{place.model('pretrained')}+{folder}")
    outcome = run("calibrate", config, "--lora-merge-cache", cache)
    assert outcome.code == 1
    assert "the adapter does not fit its base model" in outcome.output
    assert "size mismatch" in outcome.output
    assert not any(cache.iterdir())  # else it would be taken for the merged model


def test_folder_and_network_are_told_apart(place: Workplace) -> None:
    gone = place.folder / "nowhere"
    message = refused(place.folder, "calibrate", with_instruct(place, str(gone)))
    assert f"{gone}: model not found" in message
    assert "there is no such folder (" in message
    message = refused(place.folder, "calibrate", with_instruct(place, "acme/nowhere"))
    assert "the hub cannot be asked: no network, or offline mode" in message


def test_several_devices_without_one(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    message = refused(place.folder, "merge", place.yaml, place.folder / "out", "--multi-gpu")
    assert "--multi-gpu: this torch sees no GPU" in message


def test_adapter_as_reasoning_model(place: Workplace) -> None:
    """Tokenizer and config are the base's; a changed adapter is merged and calibrated anew."""
    folder = add_adapter(place, "reasoning")
    reference = f"{place.model('reasoning')}+{folder}"
    place.write(base_model=reference, rain={"accept": ["same_model"]})
    options = (place.yaml, place.folder / "out", "--lora-merge-cache", place.folder / "cache")
    succeed("merge", *options)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        own, out = (p / name for p in (place.model("reasoning"), place.folder / "out"))
        assert out.read_bytes() == own.read_bytes()
    assert "is up to date" in succeed("merge", *options)
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "lora_B" in name)
    weights[name] = weights[name] * 2
    path.unlink()
    save_file(weights, path, metadata={"format": "pt"})
    load = LoadOptions(lora_merge_cache=str(place.folder / "cache"))
    different = compare(read_config(place.yaml), load).differences
    assert f"the adapter of the reasoning model {reference} has changed" in different


def test_tokenizer_of_the_adapter_is_taken(place: Workplace) -> None:
    folder = add_adapter(place, "reasoning")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((place.model("reasoning") / name).read_bytes())
    (folder / "chat_template.jinja").write_text(
        (place.model("reasoning") / "chat_template.jinja").read_text() + "{# the adapter's #}"
    )
    place.write(base_model=f"{place.model('reasoning')}+{folder}", rain={"accept": ["same_model"]})
    out = place.folder / "out"
    succeed("merge", place.yaml, out, "--lora-merge-cache", place.folder / "cache")
    assert "the adapter's" in (out / "chat_template.jinja").read_text()


def test_template_is_fetched_from_the_hub(place: Workplace) -> None:
    """mergekit fetches no `*.jinja`, where the newer models have their chat template."""
    names = {role: f"acme/{role}" for role in ("reasoning", "instruct", "pretrained")}
    with model_hub.serving({names[role]: place.model(role) for role in names}) as address:
        environment = {
            **os.environ,
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(place.folder / "home"),
            "NO_PROXY": "127.0.0.1",
        }
        entries = [
            {"model": names[role], "parameters": {"role": role}} for role in names if role[0] != "r"
        ]
        place.write(base_model=names["reasoning"], models=entries)
        outcome = run_process("merge", place.yaml, place.folder / "out", env=environment)
    assert outcome.code == 0, outcome.output
    own, out = (p / "chat_template.jinja" for p in (place.model("reasoning"), place.folder / "out"))
    assert out.read_bytes() == own.read_bytes()


def test_links_to_elsewhere_are_not_copied(tmp_path: Path) -> None:
    """Of the hub's cache they lead into its own store, which is the model's."""
    (tmp_path / "secret.json").write_text("{}")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    blobs = tmp_path / "models--a--b" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "0a").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0a")
    (snapshot / "stolen.json").symlink_to(tmp_path / "secret.json")
    assert side_files(snapshot) == ["tokenizer.json"]


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("bfloat16", ("bfloat16", "torch.bfloat16", "bf16", "BF16")),
        ("float16", ("float16", "torch.half", "np.float16", "fp16")),
        ("float32", ("float32", "numpy.single", "fp32", "torch.float")),
        ("float64", ("double", "f64")),
        ("nonsense", ("nonsense",)),
    ],
)
def test_types_have_one_spelling(name: str, names: tuple[str, ...]) -> None:
    assert {type_name(one) for one in names} == {name}
