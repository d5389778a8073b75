"""A share of the calibration samples comes as the second turn of a chat."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from test_streams_exact import WHOLE, changes
from tiny import INSTRUCTION, REASONING, TEMPLATE, Tiny

from rain_mergekit.calibration.up_to_date import compare
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.writer import write_calibration
from rain_mergekit.cli import cli
from rain_mergekit.models.loading import LoadOptions

PROJECTION: Mapping[str, Any] = {"fit": "projection", "lm_head": "unseen"}
NO_SECOND = "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + TEMPLATE


def chats(tiny: Tiny) -> dict[str, list[dict[str, Any]]]:
    """Both sets with each sample as a second turn, written out; the earlier one is read back."""
    summary = tiny.using("read.rain.safetensors", **WHOLE, later_turns=1.0).calibrate()
    found = {}
    for name, data in (
        ("reasoning", summary.samples.reasoning),
        ("instruction", summary.samples.instruction),
    ):
        assert data is not None
        lines = (tiny.folder / f"{name}.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        found[name] = []
        for sample, read in zip(samples, data.read, strict=True):
            asked = {"role": "user", "content": sample.pop("prompt")}
            found[name].append({**sample, "messages": [*read.before, asked]})
    return found


def test_samples_behind_others_are_as_if_the_files_had_them_so(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "llama")
    written = chats(tiny)
    answers = {sample["prompt"]: sample["response"] for sample in INSTRUCTION}
    for samples in written.values():
        for sample in samples:
            asked, said, own = sample["messages"]
            assert answers[asked["content"]] == said["content"]
            assert asked["content"] != own["content"]
    for number, settings in enumerate((WHOLE, PROJECTION)):
        later = tiny.using(f"later{number}.rain.safetensors", **settings, later_turns=1.0)
        summary = later.calibrate()
        for name, samples in written.items():
            lines = "".join(json.dumps(sample) + "\n" for sample in samples)
            (tmp_path / f"{name}-chats.jsonl").write_text(lines)
        given = tiny.using(
            f"given{number}.rain.safetensors",
            **settings,
            **{f"{name}_data": str(tmp_path / f"{name}-chats.jsonl") for name in written},
        )
        given.calibrate()
        found, expected = read_weights_of(later.path), read_weights_of(given.path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found if key != "tokens")
        assert summary.samples.reasoning.later == len(REASONING)


def test_words_of_another_samples_answer_are_still_unseen(tmp_path: Path) -> None:
    """Rows of the head are merged for tokens that the reasoning set itself does not have."""
    tiny = Tiny.make(tmp_path, "llama")
    rows = []
    for share in (0.0, 1.0):
        made = tiny.using(f"{share}.rain.safetensors", **PROJECTION, later_turns=share)
        made.calibrate()
        rows.append(read_weights_of(made.path)["tokens"])
    assert torch.equal(*rows)


def read_weights_of(path: Path) -> dict[str, torch.Tensor]:
    file = CalibrationFile.open(path)
    names = file.keys()
    return {name: file.tensor(name) for name in names}


def test_a_share_of_both_sets_is_told_and_recorded(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "llama").using(**WHOLE, later_turns=0.5)
    path = tmp_path / "config.yml"
    path.write_text(json.dumps(tiny.content()))
    result = CliRunner().invoke(cli, ["calibrate", str(path), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["calibration"]["samples"]
    recorded = CalibrationFile.open(tiny.path).header["data"]
    later = {name: recorded[name]["later"] for name in ("reasoning", "instruction")}
    assert 0 < sum(later.values()) < len(REASONING) + len(INSTRUCTION)
    assert later == {name: told[name]["later"] for name in later}
    shown = CliRunner().invoke(cli, ["inspect", str(tiny.path)]).output
    for number in filter(None, later.values()):
        assert f"{number} of them later in a chat" in shown


@pytest.mark.parametrize("role", ["reasoning", "instruct"])
def test_a_template_without_second_turns_leaves_all_samples_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, role: str
) -> None:
    tiny = Tiny.make(tmp_path, "llama").using(**WHOLE, later_turns=1.0)
    own = tiny.tokenizer()
    own.chat_template = NO_SECOND
    own.save_pretrained(tmp_path / role)
    summary = tiny.calibrate()
    assert summary.samples.reasoning.later == 0
    assert "takes no second turn, so every sample stays a chat's first" in caplog.text
    plain = tiny.using("plain.rain.safetensors", **WHOLE)
    plain.calibrate()
    expected = changes(plain)
    assert all(torch.equal(one, expected[key]) for key, one in changes(tiny).items())


def test_samples_that_get_too_long_stay_first_turns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = Tiny.make(tmp_path, "llama")
    alone = tiny.using(**WHOLE).calibrate().samples
    assert alone.instruction is not None
    longest = max(
        len(one.input_ids) for data in (alone.reasoning, alone.instruction) for one in data.samples
    )
    found = tiny.using(**WHOLE, later_turns=1.0, max_tokens=longest).calibrate().samples
    assert len(found.reasoning.samples) == len(REASONING)
    assert found.reasoning.skipped == ()
    assert "cannot be a chat's second turn and stay its first (later_turns)" in caplog.text


def test_a_file_made_before_the_setting_is_current_without_it(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "llama").using(**WHOLE, later_turns=0.0)
    tiny.calibrate()
    header = CalibrationFile.open(tiny.path).header
    assert header["settings"].pop("later_turns") == 0.0
    write_calibration(tiny.path, header, load_file(tiny.path))
    assert compare(tiny.config(), LoadOptions()).current
    changed = tiny.using(**WHOLE, later_turns=0.5)
    [difference] = compare(changed.config(), LoadOptions()).differences
    assert "rain.later_turns is 0.5, and the file was written before" in difference
    tiny.calibrate()
    [difference] = compare(changed.config(), LoadOptions()).differences
    assert difference == "rain.later_turns is 0.5, was 0.0"


def test_samples_without_spans_may_go_before_others(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "llama").using(**WHOLE, later_turns=1.0)
    bare = [{key: one[key] for key in ("prompt", "reason", "response")} for one in INSTRUCTION]
    (tmp_path / "instruction.jsonl").write_text("".join(json.dumps(one) + "\n" for one in bare))
    found = tiny.calibrate().samples.instruction
    assert found is not None
    assert (len(found.samples), found.later) == (len(bare), len(bare))


def test_a_set_of_conversations_alone_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = Tiny.make(tmp_path, "llama").using(**WHOLE, later_turns=1.0)
    lines = []
    for one in INSTRUCTION:
        asked = {"role": "user", "content": one["prompt"]}
        chat = {**one, "messages": [asked, {"role": "assistant", "content": "So."}, asked]}
        lines.append(json.dumps({key: chat[key] for key in chat if key != "prompt"}))
    (tmp_path / "instruction.jsonl").write_text("\n".join(lines))
    assert tiny.calibrate().samples.reasoning.later == 0
    assert "can go before another one (later_turns)" in caplog.text


def test_the_paper_has_none(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "llama").using(preset="paper", fit="projection")
    assert tiny.config().settings.later_turns == 0.0


def test_whether_the_model_thinks_is_told_by_first_turns(tmp_path: Path) -> None:
    """Where there are both; a model may think on its set, and not later in a chat."""
    tiny = Tiny.make(tmp_path, "llama")
    found = tiny.using(**WHOLE, later_turns=0.5).calibrate().samples.reasoning
    first = [one.prompt for one in found.read if not one.before]
    assert 0 < len(first) < len(REASONING)
    lines = (tmp_path / "reasoning.jsonl").read_text().splitlines()
    alone = [line for line in lines if json.loads(line)["prompt"] in first]
    (tmp_path / "alone.jsonl").write_text("\n".join(alone))
    few = tiny.using("f.rain.safetensors", **WHOLE, reasoning_data=str(tmp_path / "alone.jsonl"))
    few.calibrate()
    told = [
        CalibrationFile.open(path).header["run"]["likelihood"] for path in (tiny.path, few.path)
    ]
    for marker in ("open", "close"):
        assert told[0][marker] == pytest.approx(told[1][marker], rel=1e-3)
    tiny.using(**WHOLE, later_turns=1.0).calibrate()
    assert CalibrationFile.open(tiny.path).header["run"]["likelihood"]["open"] > 0
