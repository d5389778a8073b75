"""`mergekit-rain check`: each thing that is wrong with a configuration is named, all at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROLES, Workplace, make_models, make_workplace, run, succeed
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rain_mergekit.evaluation import config_check
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def place(models: Path, tmp_path: Path) -> Workplace:
    return make_workplace(tmp_path, models)


def problems(place: Workplace, level: str = "problem") -> dict[str, str]:
    """Texts by topic."""
    outcome = run("check", place.yaml, "--json")
    content: dict[str, Any] = json.loads(outcome.stdout)
    found = {item["topic"]: item["text"] for item in content["findings"] if item["level"] == level}
    assert (outcome.code == 3) == (level == "problem" and bool(found)) or level == "warning"
    return found


def test_good_configuration(place: Workplace) -> None:
    said = succeed("check", place.yaml)
    assert said.splitlines()[-1] == "Verdict: 0 problems, 0 warnings"
    assert "task vectors: instruct 0.1" in said
    assert "reasoning: stored as 14 BF16" in said
    assert "thinking markers: <think>" in said
    assert "rank at most " in said
    assert not place.calibration.exists()


def test_expected_size_is_a_bound(place: Workplace) -> None:
    said = succeed("check", place.yaml)
    most = float(said.partition("file at most ")[2].partition(" MiB")[0])
    succeed("calibrate", place.yaml, "--quiet")
    assert place.calibration.stat().st_size < (most + 0.2) * 2**20
    assert "is there already" in succeed("check", place.yaml)


def test_other_shapes(place: Workplace) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][:-1].clone()

    place.change_weights("instruct", cut)
    assert name in problems(place)["shapes"]


def test_vocabularies_of_other_sizes(place: Workplace) -> None:
    name = "model.embed_tokens.weight"

    def more(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.cat([tensors[name], tensors[name][:5]])

    place.change_weights("instruct", more)
    found = problems(place)
    assert "add `tokenizer: {source: base}`" in found["vocabulary"]
    assert "shapes" not in found
    place.write(tokenizer={"source": "base"})
    assert "vocabulary" not in problems(place)


def test_types_that_are_rounded_or_quantised(place: Workplace) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.float() for name, tensor in tensors.items()})

    place.change_weights("instruct", widen)
    assert "rounds its float32 weights to bfloat16" in problems(place, "warning")["types"]

    def code(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(4, 4, dtype=torch.int8)

    place.change_weights("instruct", code)
    assert "I8: quantised weights cannot be merged" in problems(place)["types"]


def test_models_that_are_equal_or_of_no_common_origin(place: Workplace) -> None:
    def scramble(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.dim() > 1:
                tensors[name] = torch.randn(tensor.shape).to(tensor.dtype)

    equal = place.config["models"][1]
    place.write(models=[{**equal, "parameters": {"role": "instruct"}}, equal])
    assert "the task vector is zero" in problems(place)["models"]
    place.write()
    place.change_weights("instruct", scramble)
    assert "not of one origin" in problems(place)["relations"]


def test_other_template_and_no_template(place: Workplace) -> None:
    template = place.model("instruct") / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert "another chat template" in succeed("check", place.yaml)
    (place.model("reasoning") / "chat_template.jinja").unlink()
    assert "has no chat template" in problems(place)["templates"]


def test_each_tokenizer_is_loaded_once(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(model: Checkpoint) -> PreTrainedTokenizerBase:
        loaded.append(model.path)
        return load_tokenizer(model)

    monkeypatch.setattr(config_check, "load_tokenizer", load)
    succeed("check", place.yaml)
    assert sorted(loaded) == sorted(str(place.model(role)) for role in ROLES)


def test_vocabularies_are_a_finding_of_their_own(place: Workplace) -> None:
    """They are not told again among what the calibration will say."""

    def cut(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1].clone()

    place.change_weights("instruct", cut)
    said = run("check", place.yaml).output
    assert said.count("mergekit stops there") == 1
    assert "mergekit will not merge them as they are" not in said


def test_sets_that_are_missing_do_not_end_the_check(place: Workplace) -> None:
    (place.folder / "instruction.jsonl").unlink()
    found = problems(place)
    assert set(found) == {"calibration"}
    assert "cannot read the calibration set" in found["calibration"]


def test_models_that_are_not_there(place: Workplace) -> None:
    place.config["base_model"] = str(place.folder / "nowhere")
    place.write()
    assert set(problems(place)) == {"models"}
