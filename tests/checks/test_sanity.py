"""Merges that nobody wants are refused and named, and can be had on purpose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
from mergekit.common import ModelReference
from merging import merge
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, Tiny, model_config, random_weights
from transformers import AutoConfig, AutoModelForCausalLM

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.capture.output_head import finishing
from rain_mergekit.checks.thinking_likelihood import Likelihood
from rain_mergekit.errors import RainError
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.text.calibration_sets import load_reasoning

MERGED = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module", name="models")
def _models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    Tiny.make(folder, "qwen2")
    return folder


@pytest.fixture(name="tiny")
def _tiny(models: Path, tmp_path: Path) -> Tiny:
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    return Tiny(tmp_path)


def accepting(tiny: Tiny, *checks: str) -> Tiny:
    return tiny.using(accept=["no_thinking", *checks])


def change(tiny: Tiny, role: str, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = tiny.folder / role / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def copy_weights(tiny: Tiny, source: str, target: str) -> None:
    name = "model.safetensors"
    shutil.copyfile(tiny.folder / source / name, tiny.folder / target / name)


def refused(tiny: Tiny) -> str:
    """Nothing is written, and no layer is computed: the work folder is not even made."""
    with pytest.raises(RainError) as caught:
        tiny.calibrate()
    assert not tiny.path.exists()
    assert not Path(f"{tiny.path}.work").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "target"),
    [("instruct", "pretrained"), ("reasoning", "instruct"), ("pretrained", "reasoning")],
)
def test_one_model_in_two_roles(tiny: Tiny, source: str, target: str) -> None:
    copy_weights(tiny, source, target)
    error = refused(tiny)
    assert "one model is given twice" in error
    assert f"{source} model {tiny.folder / source}" in error
    assert f"{target} model {tiny.folder / target}" in error
    assert "`accept: [same_model]`" in error


def test_one_model_twice_on_purpose(tiny: Tiny) -> None:
    """It is calibrated and merged, and the reasoning model comes out, with a warning on file."""
    copy_weights(tiny, "instruct", "pretrained")
    wanted = accepting(tiny, "same_model").using(
        rank_by="energy", accept=["no_thinking", "same_model"]
    )
    assert any("given twice" in text for text in wanted.calibrate().warnings)
    assert any("given twice" in t for t in CalibrationFile.open(wanted.path).header["warnings"])
    merged = merge(tiny.folder / "out", wanted.content()).weights()
    reasoning = tiny.weights("reasoning")
    assert all(torch.equal(merged[name], reasoning[name]) for name in merged)


def test_a_difference_outside_of_the_merged_tensors_is_none(tiny: Tiny) -> None:
    copy_weights(tiny, "instruct", "pretrained")
    change(tiny, "pretrained", lambda weights: weights["model.norm.weight"].add_(1))
    assert "the task vector is zero" in refused(tiny)


def test_a_difference_in_one_number_is_one(tiny: Tiny) -> None:
    """In a row that no sample of rows holds."""
    copy_weights(tiny, "instruct", "pretrained")

    def edit(weights: dict[str, torch.Tensor]) -> None:
        weights[MERGED][13, 5] += 1e-3

    change(tiny, "pretrained", edit)
    assert tiny.calibrate().path.exists()


def retyped(tiny: Tiny, role: str, dtype: torch.dtype) -> None:
    """The same model as another program saves it, with a tensor that nobody merges."""

    def edit(weights: dict[str, torch.Tensor]) -> None:
        weights.update({name: value.to(dtype) for name, value in weights.items()})
        weights["model.left_over"] = torch.ones(2)

    change(tiny, role, edit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("instruct", "pretrained", "the task vector is zero"),
        ("reasoning", "instruct", "one model is given twice"),
    ],
)
def test_one_model_in_two_types(
    tiny: Tiny, source: str, target: str, words: str, dtype: torch.dtype
) -> None:
    copy_weights(tiny, source, target)
    retyped(tiny, target, dtype)
    error = refused(tiny)
    assert f"the {source} model {tiny.folder / source}" in error
    assert f"differ in no tensor to be merged, unless by rounding: {words}" in error


def test_a_small_change_is_no_rounding(tiny: Tiny) -> None:
    """As large as rounding would be, in models of one type: it was trained."""
    copy_weights(tiny, "instruct", "pretrained")
    change(tiny, "pretrained", lambda weights: weights[MERGED].mul_(1 + 1e-4))
    assert tiny.calibrate().path.exists()


@pytest.mark.parametrize(("role", "factor"), [("pretrained", 0.0), ("pretrained", 1e3)])
def test_pretrained_model_of_another_size(tiny: Tiny, role: str, factor: float) -> None:
    """The change is not larger than the weights of the larger one, and larger than the other's."""

    def edit(weights: dict[str, torch.Tensor]) -> None:
        for value in weights.values():
            value.mul_(factor)

    change(tiny, role, edit)
    error = refused(tiny)
    assert "is not tuned from it" in error
    assert "`accept: [large_task_vector]`" in error


def shuffle(tiny: Tiny, role: str) -> None:
    """Another model of the same shape."""

    def edit(weights: dict[str, torch.Tensor]) -> None:
        for name, value in weights.items():
            weights[name] = value.flatten()[torch.randperm(value.numel())].view_as(value)

    change(tiny, role, edit)


def test_task_vector_larger_than_the_weights(tiny: Tiny) -> None:
    shuffle(tiny, "pretrained")
    error = refused(tiny)
    weights = {role: tiny.weights(role) for role in ("instruct", "pretrained")}
    names = [name for name in weights["instruct"] if "_proj.weight" in name]
    tuned, origin = (
        torch.cat([weights[role][name].double().flatten() for name in names]) for role in weights
    )
    whole = float((tuned - origin).norm() / origin.norm())
    assert float(error.split("the task vector is ")[1].split()[0]) == pytest.approx(whole, rel=0.1)
    assert str(tiny.folder / "pretrained") in error
    wanted = accepting(tiny, "large_task_vector")
    assert any("is not tuned from it" in text for text in wanted.calibrate().warnings)


def test_the_merge_looks_at_models_that_were_not_calibrated(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    def merged(name: str, role: str) -> Any:
        """With that model in that role, and the calibrated ones in the others."""
        roles = {part: part for part in ("instruct", "pretrained")} | {role: name}
        models = [
            {"model": str(tiny.folder / model), "parameters": {"role": part}}
            for part, model in roles.items()
        ]
        return merge(tiny.folder / f"out-{name}", tiny.content(models=models))

    tiny.calibrate()
    for name in ("tuned", "other", "copy"):
        shutil.copytree(tiny.folder / "instruct", tiny.folder / name)
    change(tiny, "tuned", lambda weights: weights[MERGED].mul_(1.01))
    shuffle(tiny, "other")
    assert merged("tuned", "instruct").code == 0
    assert "made with another instruct model" in caplog.text
    assert "`accept: [large_task_vector]`" in merged("other", "pretrained").error()
    assert "given twice" in merged("copy", "pretrained").error()
    for name, edit, words in (
        ("numbers", other_numbers, "that both have different numbers"),
        ("marked", other_marker, "the marker '<think>' is [4]"),
    ):
        shutil.copytree(tiny.folder / "tuned", tiny.folder / name)
        edit_tokens(tiny, name, edit)
        error = merged(name, "instruct").error()
        assert words in error
        assert "`accept: [other_tokens]`" in error


@pytest.fixture(scope="module", name="cut")
def _cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return commands.make_models(tmp_path_factory.mktemp("cut"))


def swapped(place: commands.Workplace) -> tuple[str, str, list[dict[str, Any]]]:
    """The instruct and the reasoning model's folders, and the configuration's other models."""
    instruct, reasoning = str(place.model("instruct")), str(place.model("reasoning"))
    models: list[dict[str, Any]] = [
        {"model": reasoning, "parameters": {"role": "instruct"}},
        {"model": str(place.model("pretrained")), "parameters": {"role": "pretrained"}},
    ]
    return instruct, reasoning, models


def check_swapped(
    place: commands.Workplace, base: str, role: str, thinks: str, models: list[dict[str, Any]]
) -> None:
    """Refused: in the place of the reasoning model nothing thinks, in that of the role one does."""
    place.write(base_model=base, models=models)
    outcome = commands.run("calibrate", place.yaml)
    assert outcome.code == 1
    assert f"{base} does not think on the reasoning set" in outcome.output
    assert f"the {role} model {thinks} does" in outcome.output
    assert "so the two are swapped" in outcome.output
    assert not place.calibration.exists()


def test_reasoning_and_instruct_model_swapped(cut: Path, tmp_path: Path) -> None:
    place = commands.make_workplace(tmp_path, cut)
    instruct, reasoning, models = swapped(place)
    check_swapped(place, instruct, "instruct", reasoning, models)
    place.write(base_model=instruct, models=models, rain={"accept": ["no_thinking"]})
    assert "(accepted)" in commands.succeed("calibrate", place.yaml)


def test_reasoning_and_pretrained_model_swapped(cut: Path, tmp_path: Path) -> None:
    place = commands.make_workplace(tmp_path, cut)
    reasoning, pretrained = str(place.model("reasoning")), str(place.model("pretrained"))
    models: list[dict[str, Any]] = [
        {"model": str(place.model("instruct")), "parameters": {"role": "instruct"}},
        {"model": reasoning, "parameters": {"role": "pretrained"}},
    ]
    check_swapped(place, pretrained, "pretrained", reasoning, models)


def opened_by_template(place: commands.Workplace) -> None:
    """As many published models have it: the open marker is part of the prompt."""
    for role in commands.ROLES:
        template = place.model(role) / "chat_template.jinja"
        template.write_text(template.read_text().rstrip("\n") + "<think>")


def test_swapped_where_the_template_opens_the_block(cut: Path, tmp_path: Path) -> None:
    """Anybody closes an open block; that the instruct model likes the thinking better tells."""
    place = commands.make_workplace(tmp_path, cut)
    opened_by_template(place)
    assert "are swapped" not in commands.succeed("calibrate", place.yaml)
    right = CalibrationFile.open(place.calibration).header["run"]["likelihood"]
    place.calibration.unlink()
    instruct, reasoning, models = swapped(place)
    place.write(base_model=instruct, models=models)
    outcome = commands.run("calibrate", place.yaml)
    assert outcome.code == 1
    words = f"the instruct model {reasoning} is more likely to write the thinking"
    assert words in outcome.output
    assert f"({right['thinking']:.2g} nats a token) than the reasoning model {instruct}" in (
        outcome.output
    )
    assert not place.calibration.exists()
    place.write(base_model=instruct, models=models, rain={"accept": ["no_thinking"]})
    assert "(accepted)" in commands.succeed("calibrate", place.yaml)


def test_a_pretrained_model_that_thinks_better_is_a_warning(cut: Path, tmp_path: Path) -> None:
    """It may, where the template opens the block and another model wrote the set."""
    place = commands.make_workplace(tmp_path, cut)
    opened_by_template(place)
    place.change_weights("reasoning", lambda weights: weights["model.norm.weight"].mul_(0.3))
    place.change_weights("instruct", lambda weights: weights["model.norm.weight"].mul_(0.1))
    output = commands.succeed("calibrate", place.yaml)
    words = f"the pretrained model {place.model('pretrained')} is more likely to write the thinking"
    assert words in output
    assert "are the two swapped, or did another model write the set?" in output
    found = CalibrationFile.open(place.calibration).header
    assert any(words in text for text in found["warnings"])


def test_a_set_on_which_nobody_thinks(tiny: Tiny) -> None:
    """The work that was done is kept: who accepts the outcome goes on after the last layer."""
    config = tiny.using(accept=[])
    with pytest.raises(RainError, match="the markers, the chat template or the set") as caught:
        config.calibrate(snapshot_seconds=0)
    assert "`accept: [no_thinking]`" in str(caught.value)
    assert not tiny.path.exists()
    assert tiny.calibrate().first_layer == 1


def other_template(tiny: Tiny) -> None:
    path = tiny.folder / "reasoning" / "chat_template.jinja"
    path.write_text(f"{path.read_text()}{{# another one #}}")


def test_an_interrupted_run_does_not_go_on_with_another_template(tiny: Tiny) -> None:
    """Else the layers before and those after would have seen other tokens."""
    with pytest.raises(RainError, match="does not think"):
        tiny.using(accept=[]).calibrate(snapshot_seconds=0)
    other_template(tiny)
    assert tiny.calibrate().first_layer == 0


@pytest.mark.parametrize("changed", [False, True])
def test_a_template_that_has_changed_since(
    tiny: Tiny, caplog: pytest.LogCaptureFixture, *, changed: bool
) -> None:
    tiny.calibrate()
    if changed:
        other_template(tiny)
    merge(tiny.folder / "merged", tiny.content()).weights()
    words = "the tokenizer or the chat template of"
    found = f"{words} {tiny.folder / 'reasoning'} has changed since the calibration" in caplog.text
    assert found == changed
    tiny.config()
    output = commands.succeed("merge", tiny.path.with_suffix(".yml"), tiny.folder / "out")
    assert (f"Calibration needed: {words} the reasoning model" in output) == changed


def test_accepting_is_no_other_calibration(tiny: Tiny) -> None:
    tiny.calibrate()
    wanted = tiny.using(accept=["no_thinking", "other_tokens"])
    wanted.config()
    output = commands.succeed("merge", wanted.path.with_suffix(".yml"), tiny.folder / "out")
    assert "Calibrating" not in output


def edit_tokens(tiny: Tiny, role: str, edit: Callable[[dict[str, Any]], None]) -> None:
    path = tiny.folder / role / "tokenizer.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def marker(content: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(t for t in content["added_tokens"] if t["content"] == "<think>")
    return found


def other_numbers(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    plain = [text for text in vocabulary if vocabulary[text] > 10]
    numbers = [vocabulary[text] for text in plain]
    content["model"]["vocab"].update(zip(plain, reversed(numbers), strict=True))


def other_marker(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["<think>"] = marker(content)["id"] = 350


def no_marker(content: dict[str, Any]) -> None:
    """The number of the marker belongs to another added token there, as in published pairs."""
    number = content["model"]["vocab"].pop("<think>")
    marker(content)["content"] = "<|box|>"
    content["model"]["vocab"]["<|box|>"] = number


def a_word(content: dict[str, Any]) -> None:
    """The number of the marker is an ordinary word there."""
    number = content["model"]["vocab"].pop("<think>")
    content["added_tokens"].remove(marker(content))
    content["model"]["vocab"]["thought"] = number


@pytest.mark.parametrize("role", ["instruct", "pretrained"])
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (other_numbers, "that both have different numbers"),
        (other_marker, "the marker '<think>' is [4] to the reasoning model's tokenizer, and [350]"),
        (a_word, "the marker '<think>' is [4] to the reasoning model's tokenizer"),
        (no_marker, None),
    ],
)
def test_tokenizers(
    tiny: Tiny, role: str, edit: Callable[[dict[str, Any]], None], words: str | None
) -> None:
    edit_tokens(tiny, role, edit)
    if words is None:
        assert all("does not think" in text for text in tiny.calibrate().warnings)
        return
    error = refused(tiny)
    assert words in error
    assert f"the {role} model {tiny.folder / role}" in error
    assert any(words in text for text in accepting(tiny, "other_tokens").calibrate().warnings)


def test_models_without_a_tokenizer_are_not_compared(tiny: Tiny) -> None:
    for role in ("instruct", "pretrained"):
        for path in (tiny.folder / role).glob("token*"):
            path.unlink()
    assert tiny.calibrate().path.exists()


@pytest.mark.parametrize("template_opens", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_likelihood_equals_the_whole_model(
    tmp_path: Path, family: str, *, template_opens: bool
) -> None:
    tiny = Tiny.make(tmp_path, family)
    if template_opens:
        template = tmp_path / "reasoning" / "chat_template.jinja"
        template.write_text(template.read_text() + "<think>")
    tiny.calibrate()
    found = CalibrationFile.open(tiny.path).header["run"]["likelihood"]
    samples = load_reasoning(tmp_path / "reasoning.jsonl", tiny.tokenizer()).samples
    model = tiny.model()
    sums = {4: 0.0, 5: 0.0}  # the numbers of the two markers
    thinking: list[float] = []
    few = sorted(samples, key=lambda sample: len(sample.input_ids))[:4]
    for sample in samples:
        ids = torch.tensor([sample.input_ids])
        with torch.no_grad():
            chances = model(ids).logits[0].softmax(-1)
        for token in sums:
            place = sample.input_ids.index(token)
            sums[token] += float(chances[place - 1, token]) / len(samples)
        inside = range(sample.input_ids.index(4) + 1, sample.input_ids.index(5) + 1)
        if sample in few:
            thinking += [float(chances[i - 1, sample.input_ids[i]].log()) for i in inside]
    assert found["close"] == pytest.approx(sums[5], rel=1e-3)
    if template_opens:
        assert found["open"] is None
        assert found["thinking"] == pytest.approx(sum(thinking) / len(thinking), rel=1e-3)
    else:
        assert found["thinking"] is None
        assert found["open"] == pytest.approx(sums[4], rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gemma2", {"final_logit_softcapping": 0.5, "head_dim": 12}),
        ("granite", {"logits_scaling": 7.0}),
        ("cohere", {"logit_scale": 0.3}),
    ],
)
def test_what_models_do_to_their_logits_is_done(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    config = model_config("qwen2", model_type=kind, **options)
    config.tie_word_embeddings = True
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    random_weights(whole, 0.3)
    whole.save_pretrained(tmp_path)
    states: list[torch.Tensor] = []
    whole.model.layers[-1].register_forward_hook(
        lambda _module, _args, out: states.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        expected = whole(torch.arange(20)[None]).logits[0]
    checkpoint = Checkpoint.open(ModelReference.model_validate(str(tmp_path)))
    layerwise = LayerwiseModel.open(
        checkpoint, AutoConfig.from_pretrained(tmp_path), torch.float32, "cpu"
    )
    with finishing(layerwise) as logits:
        found = logits(states[0][0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert all(parameter.is_meta for parameter in layerwise.model.parameters())
    assert layerwise.decoder.layers is layerwise.layers


@pytest.mark.parametrize(
    ("opening", "closing", "thinks"),
    [(0.9, 1.0, True), (0.48, 1.0, False), (1.0, 0.005, False), (None, 0.5, True)],
)
def test_thinking_needs_both_markers(opening: float | None, closing: float, thinks: bool) -> None:
    found = Likelihood(open=opening, close=closing)
    assert found.thinks == thinks
    assert replace(found, close=float("nan")).thinks is False
