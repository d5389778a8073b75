"""What the names of the models say of their roles."""

from __future__ import annotations

import pytest
from commands import Workplace, make_models, make_workplace, run
from mergekit.common import ModelReference

from rain_mergekit.checks.role_names import swapped_hint


def hint(instruct: str, pretrained: str) -> str | None:
    return swapped_hint(ModelReference.parse(instruct), ModelReference.parse(pretrained))


@pytest.mark.parametrize(
    "name",
    [
        *("Qwen/Qwen2.5-7B-Instruct", "google/gemma-2-9b-it", "meta-llama/Llama-2-7b-chat-hf"),
        *("allenai/OLMo-2-1124-7B-SFT", "./local/Mistral-7B-Instruct-v0.3"),
        "/c/models--Qwen--Qwen2.5-7B-Instruct/snapshots/abc",
    ],
)
def test_tuned_model_as_the_pretrained_one(name: str) -> None:
    said = hint("some/base", name)
    assert said is not None
    assert "Δ is instruct minus pretrained" in said
    assert hint(name, "some/base") is None
    assert hint(name, name) is None


@pytest.mark.parametrize(
    "name", ["acme/Bitwise-7B", "acme/chatty", "x/Italian-7B", "instruct/base"]
)
def test_other_words_are_no_hint(name: str) -> None:
    assert hint("some/base", name) is None


def test_command_says_what_is_subtracted(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("roles")
    place: Workplace = make_workplace(folder / "place", make_models(folder / "models"), samples=4)
    place.model("pretrained").rename(folder / "place" / "base-instruct")
    place.model("instruct").rename(folder / "place" / "tuned")
    models = [
        {"model": str(place.model("tuned")), "parameters": {"role": "instruct"}},
        {"model": str(folder / "place" / "base-instruct"), "parameters": {"role": "pretrained"}},
    ]
    outcome = run("calibrate", place.write(models=models), "--transformers-cache", folder / "c d")
    assert outcome.code == 0, outcome.output
    assert f"Δ = {place.model('tuned')} − {folder / 'place' / 'base-instruct'}" in outcome.output  # noqa: RUF001
    assert "the model with role pretrained is called 'instruct'" in outcome.output
    last = outcome.stdout.splitlines()[-1]
    assert last == f"Next: mergekit-yaml {place.yaml} ./merged --transformers-cache '{folder}/c d'"
