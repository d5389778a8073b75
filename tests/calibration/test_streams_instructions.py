"""The instruct model teaches the instructions in the prompt, too, where that is wanted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_streams_exact import WHOLE, Reference, agree, changes, read_texts, with_system_message
from tiny import FAMILIES, INSTRUCTION, TEMPLATE, Tiny

from rain_mergekit.cli import cli

TAUGHT = {**WHOLE, "teach_instructions": True}


def write_instruction(folder: Path, *samples: object) -> None:
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    (folder / "instruction.jsonl").write_text(lines)


def write_twin(folder: Path) -> None:
    """The reasoning set has a prompt of the instruction set, too."""
    sample = {"prompt": INSTRUCTION[0]["prompt"], "reasoning": "It is green.", "response": "Green."}
    with (folder / "reasoning.jsonl").open("a") as file:
        file.write(json.dumps(sample) + "\n")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fit_equals_the_dense_one(tmp_path: Path, family: str) -> None:
    tiny = Tiny.make(tmp_path, family).using(**TAUGHT)
    reference = Reference(tiny)
    assert sum(bool(text.asked) for text in reference.texts) == len(INSTRUCTION)
    agree(tiny, reference)


def test_a_prompt_of_both_sets_counts_once(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "llama").using(**TAUGHT)
    write_twin(tmp_path)
    agree(tiny, Reference(tiny))


def test_a_part_of_the_instruct_model_is_aimed_at_there_too(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "llama").using(**TAUGHT, teacher_strength=0.4)
    agree(tiny, Reference(tiny, [([text.ids for text in read_texts(tiny)], 0.6, 0.4)]))


def test_the_instruct_model_reads_them_in_its_own_chat_format(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "llama").using(**TAUGHT)
    agree(tiny, Reference(tiny, [(with_system_message(tiny), 0.0, 1.0)]))


def test_texts_together_and_alone_give_the_same(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "llama").using(**TAUGHT)
    write_twin(tmp_path)
    reference = Reference(tiny)
    agree(tiny, reference, batch_tokens=0)


def test_instructions_that_are_divided_otherwise_stay_the_reasoning_models(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The whole prompt is one instruction, and the instruct model's template puts a word ahead."""
    tiny = Tiny.make(tmp_path, "llama").using(**TAUGHT)
    sample = {**INSTRUCTION[2], "prompt": "in brackets"}
    write_instruction(tmp_path, *INSTRUCTION[:2], sample)
    own = tiny.tokenizer()
    own.chat_template = TEMPLATE.replace("|>{{ m.content }}", "|>So {{ m.content }}")
    assert own.chat_template != TEMPLATE
    own.save_pretrained(tmp_path / "instruct")
    tiny.calibrate()
    assert "divides the instructions of 1 sample otherwise" in caplog.text


def test_samples_may_lack_instructions_and_a_missing_one_is_told(tmp_path: Path) -> None:
    bare = {key: INSTRUCTION[0][key] for key in ("prompt", "reason", "response")}
    wrong = {
        **INSTRUCTION[2],
        "related_prompt_list": [{"prompt_spans": ["in stars"], "response_spans": ["[hello]"]}],
    }
    tiny = Tiny.make(tmp_path, "llama").using("none.rain.safetensors", **TAUGHT)
    write_instruction(tmp_path, bare, wrong)
    summary = tiny.calibrate()
    instruction = summary.samples.instruction
    assert instruction is not None
    assert len(instruction.samples) == 2
    [(source, reason)] = instruction.skipped
    assert source.endswith("instruction.jsonl:2")
    assert "the prompt does not contain the span 'in stars'" in reason
    plain = tiny.using("plain.rain.safetensors", **WHOLE)
    plain.calibrate()
    expected = changes(plain)
    assert all(float((one - expected[key]).norm()) == 0 for key, one in changes(tiny).items())


def test_the_contrast_cannot_teach_them(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "llama").using(**TAUGHT, teacher="contrast")
    path = tmp_path / "config.yml"
    path.write_text(json.dumps(tiny.content()))
    result = CliRunner().invoke(cli, ["calibrate", str(path)])
    assert result.exit_code == 1
    assert "teach_instructions needs teacher: instruct" in result.output
