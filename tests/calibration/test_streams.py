"""Stream matching in use: the merge, two models alone, teachers, resume, adapters, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import merging
import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import Tiny, read_weights
from torch import Tensor

from rain_mergekit.calibration import answer_emphasis, stream_engine
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.cli import cli
from rain_mergekit.errors import RainError

MODULES = 14  # seven linear modules in each of two layers
# test_streams_start.py has what is otherwise with a share of the instruct model.
FROM_REASONING = {"fit": "streams", "stream_start": 0.0}


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Calibrated with two models alone, from the reasoning model on."""
    tiny = Tiny.make(tmp_path_factory.mktemp("made"), "qwen2").using(**FROM_REASONING)
    tiny.path.with_suffix(".yml").write_text(yaml.safe_dump(alone(tiny)))
    run("calibrate", str(tiny.path.with_suffix(".yml")), "--quiet")
    return tiny


def alone(tiny: Tiny, **changes: Any) -> dict[str, Any]:
    """The YAML without a pretrained model."""
    content = tiny.content(**changes)
    return {**content, "models": content["models"][:1]}


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def products(tiny: Tiny) -> dict[str, Tensor]:
    """A Bᵀ of each weight as the file stores it, float64."""
    stored = load_file(tiny.path)
    header = CalibrationFile.open(tiny.path).header["tensors"]
    return {n: stored[e["a"]].double() @ stored[e["b"]].double().mT for n, e in header.items()}


def test_mergekit_adds_the_change_and_nothing_else(made: Tiny, tmp_path: Path) -> None:
    outcome = merging.merge_process(tmp_path, alone(made))
    merged, own, changes = outcome.weights(), made.weights("reasoning"), products(made)
    assert len(changes) == MODULES
    for name, weight in own.items():
        expected = weight.double() + changes.get(name, torch.zeros_like(weight))
        assert torch.allclose(merged[name].double(), expected, rtol=1e-6, atol=1e-7)
        assert name in changes or torch.equal(merged[name], weight)


def stays_at_lambda_0(made: Tiny, folder: Path) -> bool:
    """Whether the merge in `folder` at lambda 0 is the reasoning model, bit for bit."""
    parameters = {"calibration": str(made.path), "lambda": 0.0}
    outcome = merging.merge_process(folder, alone(made, parameters=parameters))
    own = made.weights("reasoning")
    return all(torch.equal(tensor, own[name]) for name, tensor in outcome.weights().items())


def test_with_lambda_0_the_reasoning_model_stays_bit_for_bit(made: Tiny, tmp_path: Path) -> None:
    assert stays_at_lambda_0(made, tmp_path)


def test_another_lambda_is_warned_of(made: Tiny, tmp_path: Path) -> None:
    parameters = {"calibration": str(made.path), "lambda": 0.7}
    outcome = merging.merge_process(tmp_path, alone(made, parameters=parameters))
    assert outcome.output.count("teacher_strength") == 1


def test_a_pretrained_model_changes_nothing(made: Tiny) -> None:
    three = made.using("three.rain.safetensors", **FROM_REASONING)
    three.calibrate()
    two = products(made)
    assert all(torch.equal(change, two[name]) for name, change in products(three).items())


def test_two_models_need_a_pretrained_one_for_the_projection(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "qwen2").using(fit="projection")
    path = tiny.folder / "two.yml"
    path.write_text(yaml.safe_dump(alone(tiny)))
    result = CliRunner().invoke(cli, ["calibrate", str(path)])
    assert result.exit_code == 1
    assert "expected exactly two besides base_model" in result.output


def test_an_opened_block_is_read_by_an_instruct_model_that_opens_none(tmp_path: Path) -> None:
    """The reasoning model's template writes the marker; outputs begin after it, or with it."""
    found = []
    for start in ("", "<think>\n"):
        folder = tmp_path / f"with{len(start)}"
        folder.mkdir()
        tiny = Tiny.make(folder, "qwen2").using(fit="streams")
        tokenizer = tiny.tokenizer()
        tokenizer.chat_template += "{{ '<think>\\n' }}"
        tokenizer.save_pretrained(folder / "reasoning")
        for name in ("reasoning", "instruction"):
            path = folder / f"{name}.jsonl"
            samples = [json.loads(line) for line in path.read_text().splitlines()]
            for one in samples:
                thinking = one.pop("reasoning", None) or one.pop("reason")
                one["output"] = f"{start}{thinking}\n</think>\n\n{one.pop('response')}"
            path.write_text("".join(json.dumps(one) + "\n" for one in samples))
        tiny.calibrate()
        found.append(products(tiny))
    assert all(torch.equal(change, found[1][name]) for name, change in found[0].items())


def test_the_same_model_as_teacher_changes_nothing(made: Tiny) -> None:
    """The instruct model is the reasoning model: every target is what the module gives already."""
    tiny = made.using(
        "same.rain.safetensors", **FROM_REASONING, accept=["no_thinking", "same_model"]
    )
    content = alone(tiny)
    content["models"][0]["model"] = str(tiny.folder / "twin")
    twin = tiny.folder / "twin"
    if not twin.exists():
        twin.mkdir()
        for file in (tiny.folder / "reasoning").iterdir():
            (twin / file.name).write_bytes(file.read_bytes())
    path = tiny.folder / "same.yml"
    path.write_text(yaml.safe_dump(content))
    run("calibrate", str(path), "--quiet")
    weights = tiny.weights("reasoning")
    for name, change in products(tiny).items():
        assert float(change.norm()) < 1e-5 * float(weights[name].double().norm())


def test_strength_0_is_the_reasoning_model_everywhere(made: Tiny) -> None:
    tiny = made.using("zero.rain.safetensors", **FROM_REASONING, teacher_strength=0.0)
    tiny.calibrate()
    weights = tiny.weights("reasoning")
    for name, change in products(tiny).items():
        assert float(change.norm()) < 1e-5 * float(weights[name].double().norm())


def test_the_contrast_reads_without_the_instructions_and_has_a_strength(made: Tiny) -> None:
    tiny = made.using("contrast.rain.safetensors", **FROM_REASONING, teacher="contrast")
    summary = tiny.calibrate()
    assert summary.layer_passes["instruct"] == 2 * 3 * 2  # two readings, three texts, two layers
    whole = products(tiny)
    settings = {**FROM_REASONING, "teacher": "contrast", "teacher_strength": 0.5}
    half = made.using("half.rain.safetensors", **settings)
    half.calibrate()
    first = "model.layers.0.self_attn.q_proj.weight"  # fitted before anything else has changed
    assert torch.allclose(products(half)[first] * 2, whole[first], rtol=1e-3, atol=1e-6)


def interrupted(made: Tiny, name: str) -> Tiny:
    """The same calibration, stopped once the first layer is done."""

    class Stop(Exception):
        pass

    tiny = made.using(name, **FROM_REASONING)
    original = stream_engine.write_stream_layer

    def stopping(path: Path, name: str, result: Any) -> None:
        if name.endswith(".1"):
            raise Stop
        original(path, name, result)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_engine, "write_stream_layer", stopping)
        with pytest.raises(Stop):
            tiny.calibrate(snapshot_seconds=0.0)
    return tiny


def same_bytes(one: Path, other: Path) -> bool:
    resumed = load_file(other)
    return all(torch.equal(t, resumed[key]) for key, t in load_file(one).items())


def test_an_interrupted_run_ends_with_the_same_bytes(made: Tiny) -> None:
    """Nor are the answers compared again, for which both models would be read whole."""
    tiny = interrupted(made, "resumed.rain.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answer_emphasis, "comparing", lambda *_: pytest.fail("compared again"))
        assert tiny.calibrate(snapshot_seconds=0.0).first_layer == 1
    assert same_bytes(made.path, tiny.path)


def test_answers_are_compared_again_where_what_was_found_is_damaged(
    made: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = interrupted(made, "damaged.rain.safetensors")
    found = tiny.path.with_name(tiny.path.name + ".work") / "found-answers.safetensors"
    found.write_bytes(found.read_bytes()[:-5])
    assert tiny.calibrate(snapshot_seconds=0.0).first_layer == 1
    assert f"{found}: cannot be read" in caplog.text
    assert same_bytes(made.path, tiny.path)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT 0.21 asks
def test_the_adapter_gives_what_the_merge_gives(made: Tiny, tmp_path: Path) -> None:
    run("export-lora", str(made.path), str(tmp_path / "adapter"), "--quiet")
    outcome = merging.merge_process(tmp_path / "merge", alone(made))
    adapted = PeftModel.from_pretrained(made.model(dtype=torch.float32), tmp_path / "adapter")
    plain = made.model(dtype=torch.float32)
    plain.load_state_dict({**plain.state_dict(), **outcome.weights()})
    ids = torch.tensor([[7, 40, 90, 12, 33]])
    with torch.no_grad():
        expected, found = plain(ids).logits, adapted(ids).logits
        unmerged = made.model(dtype=torch.float32)(ids).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(unmerged, expected, atol=1e-2)


def test_no_adapter_of_a_projection(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "qwen2").using(fit="projection")
    tiny.calibrate()
    result = CliRunner().invoke(cli, ["export-lora", str(tiny.path), str(tmp_path / "adapter")])
    assert result.exit_code == 1
    assert "fit: streams" in result.output
    assert not (tmp_path / "adapter").exists()


def test_inspect_shows_ranks_and_errors(made: Tiny) -> None:
    text = run("inspect", str(made.path))
    assert "Stream matching" in text
    assert "self_attn.o_proj" in text
    found = json.loads(run("inspect", str(made.path), "--json"))["matching"]
    assert [layer["name"] for layer in found["layers"]] == ["model.layers.0", "model.layers.1"]
    assert set(found["layers"][0]["fitted"]) == {
        "prompts", "markers", "thinking", "answers", "responses",
    }  # fmt: skip
    assert all(0 < e < 2 for layer in found["layers"] for e in layer["fitted"].values())


def test_a_file_with_changes_asks_for_a_reader_that_knows_them(made: Tiny) -> None:
    with safe_open(made.path, framework="pt") as file:
        assert file.metadata()["format_version"] == "2"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"coefficients": "normalized"},
            "fit: streams does not read coefficients; set the other fit",
        ),
        ({"gamma": 0.5, "ridge": 0.1}, "does not read gamma, ridge; "),
        ({"regmean": {"rows": 64}}, "rain.regmean is for merge_method: regmean; leave it out for"),
        ({"instruction_data": None}, "instruction_data is missing"),
        ({"stream_weights": {"prompt": 1.0}}, "unknown setting"),
        ({"teacher": "both"}, "teacher"),
        ({"stream_epsilon": 0.0}, "stream_epsilon"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    made: Tiny, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RainError, match=message):
        made.using(fit="streams", **settings).config()


def test_a_missing_layer_of_the_instruct_model_is_told_before_any_work(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "qwen2").using(fit="streams")
    path = tiny.folder / "instruct" / "model.safetensors"
    weights = read_weights(tiny.folder / "instruct")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(RainError, match=r"instruct: model\.layers\.1\.mlp\.up_proj\.weight is"):
        tiny.calibrate()
    assert not tiny.path.exists()
