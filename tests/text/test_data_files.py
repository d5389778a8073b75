"""Calibration files: what is read, and that everything else is one clear RainError."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from rain_mergekit.errors import RainError
from rain_mergekit.system.json_samples import read_samples
from rain_mergekit.text.calibration_sets import read_instruction, read_reasoning
from rain_mergekit.text.samples import (
    InstructionSample,
    InstructionSpec,
    ReasoningSample,
    parse_reasoning,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Write = Callable[[str | bytes], Path]

GOOD = {"prompt": "p", "reasoning": "r", "response": "a"}
SPEC: dict[str, Any] = {"instruction_id": "i", "prompt_spans": ["p"], "response_spans": ["a"]}
INSTRUCTION: dict[str, Any] = {
    "prompt": "p",
    "reason": "r",
    "response": "a",
    "related_prompt_list": [SPEC],
}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(content: str | bytes) -> Path:
        path = tmp_path / "set.jsonl"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def _lines(*samples: object) -> str:
    return "".join(json.dumps(sample) + "\n" for sample in samples)


def test_json_list_and_json_lines_give_the_same_samples(write: Write) -> None:
    samples = [GOOD, {"prompt": "q", "output": "<think>x</think>y", "id": 7}]
    from_lines = read_reasoning(path := write(_lines(*samples)))
    from_list = read_reasoning(write("\n " + json.dumps(samples, indent=1)))
    assert from_lines == [
        ReasoningSample(f"{path}:1", "p", None, "r", "a"),
        ReasoningSample(f"{path}:2", "q", "<think>x</think>y", None, None),
    ]
    assert [sample.source for sample in from_list] == [f"{path}[0]", f"{path}[1]"]
    assert [sample.prompt for sample in from_list] == ["p", "q"]


def test_blank_lines_carriage_returns_and_byte_order_mark(write: Write) -> None:
    line = json.dumps(GOOD)
    path = write(f"\ufeff{line}\r\n\r\n{line}".encode())
    assert [sample.source for sample in read_reasoning(path)] == [f"{path}:1", f"{path}:3"]


def test_a_line_separator_inside_a_string_does_not_end_the_line(write: Write) -> None:
    text = "a\u2028b\x85c"
    path = write(json.dumps({**GOOD, "prompt": text}, ensure_ascii=False))
    assert read_reasoning(path)[0].prompt == text


def test_instruction_fields(write: Write) -> None:
    sample = {
        **INSTRUCTION,
        "related_prompt_list": [
            {**SPEC, "unrelated_response_spans": ["b"], "negative_response_spans": []},
            {"prompt_spans": [], "response_spans": [], "unrelated_response_spans": None},
        ],
        "unrelated_response_spans": ["c"],
        "meta": {"deep": [1, {"nan": float("nan")}]},
    }
    path = write(_lines(sample))
    assert read_instruction(path) == [
        InstructionSample(
            source=f"{path}:1",
            prompt="p",
            output=None,
            reasoning="r",
            response="a",
            instructions=(
                InstructionSpec("i", ("p",), ("a",), ("b",)),
                InstructionSpec("related_prompt_list[1]", (), (), ()),
            ),
            unrelated_response_spans=("c",),
        )
    ]


def test_reasoning_may_be_called_reason_but_not_both(write: Write) -> None:
    assert read_reasoning(write('{"prompt": "p", "reason": "r"}'))[0].reasoning == "r"
    with pytest.raises(RainError, match=r":1: fields 'reasoning' and 'reason' .* differ"):
        read_reasoning(write('{"prompt": "p", "reason": "r", "reasoning": "s"}'))


def test_unknown_fields_may_hold_anything(write: Write) -> None:
    huge = "1" * 10_000
    path = write('{"prompt": "p", "output": "o", "x": ' + huge + ', "y": NaN, "x": [null]}')
    assert read_reasoning(path)[0].output == "o"


def test_digest_is_of_the_bytes(write: Write) -> None:
    content = b"\xef\xbb\xbf" + _lines(GOOD).encode()
    digest, _ = read_samples(write(content), parse_reasoning)
    assert digest == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no samples"),
        (" \n\n", "holds no samples"),
        ("[]", "holds no samples"),
        (b"\xff\xfe{\x00", r":1: not UTF-8"),
        (b'{"prompt": "p", "output": "o"}\n{"prompt": "\xff"}', r":2: not UTF-8"),
        ("\0\0\0\0", r":1: not valid JSON"),
        ('{"prompt": "a\0b"}', r":1: not valid JSON"),
        ('{"prompt": "p"', r":1: not valid JSON"),
        ('{"prompt": "p", "output": "o"}\n{oops}\n', r":2: not valid JSON"),
        ('{\n "prompt": "p",\n "output": "o"\n}', r":1: not valid JSON .*one JSON object on each"),
        ('[{"prompt": "p",\n "output": "o"},\n oops]', r":3: not valid JSON"),
        ("[1]\n[2]", r":2: not valid JSON"),
        ("[" * 200_000, "nested too deeply"),
        ('{"prompt": "p", "x": ' + "[" * 200_000, r":1: .*nested too deeply"),
        ("3", r":1: a sample must be a JSON object, found a number"),
        ("[[]]", r"\[0\]: a sample must be a JSON object, found a list"),
        ('[{"prompt": "p", "output": "o"}, null]', r"\[1\]: a sample .* found null"),
        ("{}", r":1: field 'prompt' is missing or blank"),
        ('{"prompt": " \\n", "output": "o"}', r":1: field 'prompt' is missing or blank"),
        ('{"prompt": null, "output": "o"}', r":1: field 'prompt' is missing or blank"),
        ('{"prompt": ' + "1" * 10_000 + "}", r":1: field 'prompt' must be a string, found a num"),
        ('{"prompt": NaN}', r":1: field 'prompt' must be a string, found a number"),
        ('{"prompt": ["p"]}', r":1: field 'prompt' must be a string, found a list"),
        ('{"prompt": {"role": "user"}}', r":1: field 'prompt' must be a string, found an object"),
        ('{"prompt": true}', r":1: field 'prompt' must be a string, found true or false"),
        ('{"prompt": "p"}', r":1: field 'reasoning' is missing .*give 'output'"),
        ('{"prompt": "p", "output": ""}', r":1: field 'reasoning' is missing"),
        ('{"prompt": "p", "output": 3}', r":1: field 'output' must be a string"),
        ('{"prompt": "p", "output": "o", "response": []}', r":1: field 'response' must be a str"),
        ('{"prompt": "p", "prompt": "q", "output": "o"}', r":1: field 'prompt' is given twice"),
        ('{"prompt": "\\ud800", "output": "o"}', r":1: field 'prompt' has half of a surrogate"),
    ],
)
def test_broken_reasoning_files(write: Write, content: str | bytes, message: str) -> None:
    path = write(content)
    with pytest.raises(RainError, match=message) as caught:
        read_reasoning(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reason": None}, "field 'reason' is missing or blank: give 'output'"),
        ({"response": ""}, "field 'response' is missing or blank"),
        ({"related_prompt_list": None}, "field 'related_prompt_list' must be a list, found nothi"),
        ({"related_prompt_list": {}}, "field 'related_prompt_list' must be a list, found an obj"),
        ({"related_prompt_list": ["x"]}, r"field 'related_prompt_list\[0\]' must be a JSON obj"),
        ({"unrelated_response_spans": "x"}, "field 'unrelated_response_spans' must be a list"),
        ({"unrelated_response_spans": [1]}, r"'unrelated_response_spans\[0\]' must be a string"),
        ({"related_prompt_list": [SPEC, {**SPEC, "prompt_spans": 1}]}, r"list\[1\]\.prompt_spans'"),
        ({"related_prompt_list": [{"prompt_spans": []}]}, r"\[0\]\.response_spans' must be a list"),
        (
            {"related_prompt_list": [{**SPEC, "response_spans": ["a", " "]}]},
            r"'related_prompt_list\[0\]\.response_spans\[1\]' is blank",
        ),
        ({"related_prompt_list": [{**SPEC, "instruction_id": 4}]}, r"instruction_id' must be a st"),
    ],
)
def test_broken_instruction_fields(write: Write, change: dict[str, Any], message: str) -> None:
    path = write(_lines(INSTRUCTION, {**INSTRUCTION, **change}))
    with pytest.raises(RainError, match=message) as caught:
        read_instruction(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_field_given_twice_inside_an_instruction(write: Write) -> None:
    text = json.dumps(INSTRUCTION).replace('"prompt_spans"', '"prompt_spans": [], "prompt_spans"')
    with pytest.raises(RainError, match=r"\[0\]\.prompt_spans' is given twice"):
        read_instruction(write(text))


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "absent.json", "No such file"),
        (tmp_path, "not a regular file"),
        ("a\0b", "null"),
    ):
        with pytest.raises(RainError, match=message):
            read_reasoning(path)


def test_a_very_long_line(write: Write) -> None:
    sample = {**GOOD, "reasoning": "word " * 1_000_000}
    assert read_reasoning(write(_lines(sample)))[0].reasoning == sample["reasoning"]
