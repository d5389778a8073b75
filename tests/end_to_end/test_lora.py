"""`model+adapter` references work in both steps, and give what the merged model gives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from commands import ROLES, Workplace, make_models, make_workplace, refused, run
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from watching import untouched

# peft and mergekit use names that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return make_workplace(tmp_path / "place", make_models(tmp_path / "models"))


def _add_adapter(place: Workplace) -> None:
    """Write an adapter for the pretrained model, and the model with the adapter merged."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(place.model("pretrained"), dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(place.folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(place.model("pretrained"), dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, place.folder / "adapter").merge_and_unload()
    merged.save_pretrained(place.folder / "tuned")


def _models(place: Workplace, instruct: str) -> list[dict[str, object]]:
    return [
        {"model": instruct, "parameters": {"role": "instruct"}},
        {"model": str(place.model("pretrained")), "parameters": {"role": "pretrained"}},
    ]


def test_an_adapter_reference_equals_the_merged_model(place: Workplace) -> None:
    _add_adapter(place)
    reference = f"{place.model('pretrained')}+{place.folder / 'adapter'}"
    inputs = [*map(place.model, ROLES), place.folder / "adapter", place.folder / "tuned"]
    found = {}
    options = ["--lora-merge-cache", str(place.folder / "cache"), "--lora-merge-dtype", "float32"]
    for name, instruct in (("lora", reference), ("plain", str(place.folder / "tuned"))):
        calibration = str(place.folder / f"{name}.rain.safetensors")
        place.write(
            models=_models(place, instruct), parameters={"calibration": calibration}, dtype=None
        )
        out = place.folder / name
        with untouched(*inputs):
            outcome = run("merge", place.yaml, out, *options)
        assert outcome.code == 0, outcome.output
        found[name] = load_file(out / "model.safetensors")
    reasoning = load_file(place.model("reasoning") / "model.safetensors")
    changed = [k for k, v in found["plain"].items() if not torch.equal(v, reasoning[k].to(v))]
    assert len(changed) == 2  # the two modules that the adapter changes
    for name, tensor in found["plain"].items():
        torch.testing.assert_close(found["lora"][name], tensor)


def test_an_adapter_without_a_cache_folder_is_refused(place: Workplace) -> None:
    _add_adapter(place)
    reference = f"{place.model('pretrained')}+{place.folder / 'adapter'}"
    place.write(models=_models(place, reference))
    assert "--lora-merge-cache" in refused(place.folder, "calibrate", place.yaml)


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


def test_an_adapter_that_is_a_program_does_not_run(place: Workplace) -> None:
    _add_adapter(place)
    touched = place.folder / "touched"
    (place.folder / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({"x": Hostile(f"touch '{touched}'")}, place.folder / "adapter" / "adapter_model.bin")
    reference = f"{place.model('pretrained')}+{place.folder / 'adapter'}"
    place.write(models=_models(place, reference))
    outcome = run("calibrate", place.yaml, "--lora-merge-cache", place.folder / "cache")
    assert outcome.code == 1
    assert "a pickle file there holds more than weights, and could run code" in outcome.output
    assert not touched.exists()
