"""Layers by the threads of fastsafetensors: the same bits, read by it, and what goes wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make
from commands import refused, succeed
from quantised import FP8_SECTION, fp8_blocks, quantise
from safetensors.torch import load_file
from tiny import Tiny

from rain_mergekit.capture.file_loader import ThreadedFiles
from rain_mergekit.errors import RainError
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.loading import LoadOptions, open_model
from rain_mergekit.models.model_tensors import ModelTensors
from rain_mergekit.system import loader_choice
from rain_mergekit.system.loader_choice import FASTSAFETENSORS

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="the library has no wheels there")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that were read by the library, by the names of the model."""
    seen: list[str] = []
    original = ThreadedFiles.read

    def reading(self: ThreadedFiles, names: Iterable[str]) -> Any:
        found = original(self, names)
        seen.extend(found)
        return found

    monkeypatch.setattr(ThreadedFiles, "read", reading)
    return seen


def both(tiny: Tiny, fit: str) -> tuple[Any, Any]:
    """The calibration files of the two loaders."""
    found = []
    for loader in ("mmap", FASTSAFETENSORS):
        one = tiny.using(f"{fit}-{loader}.rain.safetensors", fit=fit)
        one.calibrate(loader=loader)
        found.append(load_file(one.path))
    return found[0], found[1]


def same(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> bool:
    return expected.keys() == found.keys() and all(
        torch.equal(tensor, found[name]) for name, tensor in expected.items()
    )


@pytest.mark.parametrize("fit", ["streams", "projection"])
def test_no_bit_changes(tmp_path: Path, fit: str, read: list[str]) -> None:
    """A layer lies in several files here."""
    tiny = Tiny.make(tmp_path, "qwen2", torch.bfloat16, shard="30KB", num_hidden_layers=3)
    assert len(list((tmp_path / "reasoning").glob("*.safetensors"))) > 3
    assert same(*both(tiny, fit))
    layers = {name for name in tiny.weights("reasoning") if ".layers." in name}
    assert set(read) == layers


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_are_put_together_from_their_files(
    tmp_path: Path, family: str, read: list[str]
) -> None:
    """These checkpoints have a tensor an expert, their modules one of all experts."""
    assert same(*both(make(tmp_path, family), "streams"))
    assert [name for name in read if name.endswith("experts.down_proj")]


def test_a_quantised_model_is_read_from_mapped_files(tmp_path: Path, read: list[str]) -> None:
    tiny = Tiny.make(tmp_path, "llama")
    quantise(tmp_path / "instruct", FP8_SECTION, fp8_blocks)
    assert same(*both(tiny, "streams"))
    layers = [name for name in tiny.weights("reasoning") if ".layers." in name]
    assert set(read) == set(layers)
    passes = len(read) // len(layers)
    assert len(read) == passes * len(layers)
    assert passes == 2  # of the reasoning model alone: answers compared, streams matched


def tensors(folder: Path) -> ModelTensors:
    tiny = Tiny(folder.parent)
    checkpoint = open_model(tiny.config().reasoning, LoadOptions())
    return ModelTensors.of(checkpoint, tiny.model())


def test_what_cannot_be_read_is_one_sentence_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A file that was whole when its header was read, and is not any more."""
    Tiny.make(tmp_path, "llama")
    model = tensors(tmp_path / "reasoning")
    names = [name for name in model.known if ".layers.0." in name]
    path = tmp_path / "reasoning" / "model.safetensors"
    whole = path.read_bytes()
    files = ThreadedFiles(model, "cpu")
    assert files.read(names).keys() == set(names)
    with pytest.raises(RainError, match="tensor no such is not in the checkpoint"):
        files.read(["no such"])
    path.write_bytes(whole[:-100])
    with pytest.raises(RainError, match=r"model\.safetensors: cannot read the checkpoint: "):
        files.read(names)
    path.write_bytes(whole)
    sizes = Checkpoint.sizes

    def truncating(self: Checkpoint, wanted: Iterable[str]) -> dict[str, int]:
        found = sizes(self, wanted)
        path.write_bytes(whole[: len(whole) // 4])
        return found

    monkeypatch.setattr(Checkpoint, "sizes", truncating)
    capfd.readouterr()
    with pytest.raises(RainError, match=r"model\.safetensors: fastsafetensors cannot read it: "):
        files.read([name for name in model.known if ".layers.1." in name])
    assert capfd.readouterr().out == ""  # where --json is asked for, nothing else may stand


def test_a_gpu_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    Tiny.make(tmp_path, "llama")
    with pytest.raises(RainError, match=r"cannot read it: .*; read it with --loader mmap"):
        ThreadedFiles(tensors(tmp_path / "reasoning"), "cuda:99").read(["lm_head.weight"])


def test_sizes_are_those_of_the_tensors(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "llama", torch.bfloat16)
    quantise(tmp_path / "reasoning", FP8_SECTION, fp8_blocks)
    checkpoint = open_model(tiny.config().reasoning, LoadOptions())
    weights = tiny.weights("reasoning")
    assert {t.dtype for t in weights.values()} >= {torch.float8_e4m3fn, torch.bfloat16}
    assert checkpoint.sizes(weights) == {name: t.nbytes for name, t in weights.items()}


def test_the_command_line_takes_it(tmp_path: Path, read: list[str]) -> None:
    tiny = Tiny.make(tmp_path, "llama").using(fit="streams")
    succeed("calibrate", tiny.config().path, "--device", "cpu", "--loader", FASTSAFETENSORS)
    assert read


def test_what_it_needs_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = Tiny.make(tmp_path, "llama").using(fit="streams")
    words = ("calibrate", tiny.config().path, "--device", "cpu", "--loader", FASTSAFETENSORS)
    assert "leave out --no-read-ahead" in refused(tmp_path, *words, "--no-read-ahead")
    with pytest.raises(RainError, match="loader 'fast' is not known: choose one of mmap, fast"):
        tiny.calibrate(loader="fast")
    monkeypatch.setattr(loader_choice, "find_spec", lambda _: None)
    assert "pip install 'rain-mergekit[fast]'" in refused(tmp_path, *words)
    assert not tiny.path.exists()
