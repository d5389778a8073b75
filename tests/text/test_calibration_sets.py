"""Checks of the two calibration sets that are shipped with the project."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import needs_rules

from rain_mergekit.instructions import own
from rain_mergekit.instructions.prompts import Asked, Instruction
from rain_mergekit.instructions.rules import follows

FOLDER = Path(__file__).resolve().parents[2] / "calibration"
INSTRUCTION_FIELDS = {
    "id",
    "prompt",
    "reason",
    "response",
    "related_prompt_list",
    "unrelated_response_spans",
}
RELATED_FIELDS = {
    "instruction_id",
    "kwargs",
    "prompt_spans",
    "response_spans",
    "unrelated_response_spans",
}
REASONING_FIELDS = {"id", "domain", "prompt", "reasoning", "response"}


def load(name: str) -> list[dict[str, Any]]:
    """Read a JSON Lines file of the calibration folder."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line.strip()]


@pytest.fixture(scope="module")
def instruction() -> list[dict[str, Any]]:
    return load("instruction.jsonl")


@pytest.fixture(scope="module")
def reasoning() -> list[dict[str, Any]]:
    return load("reasoning.jsonl")


def ranges(text: str, span: str) -> Iterator[tuple[int, int]]:
    """Yield the start and end of every occurrence of a span, overlapping ones too."""
    start = text.find(span)
    while start >= 0:
        yield start, start + len(span)
        start = text.find(span, start + 1)


def overlaps(text: str, first: list[str], second: list[str]) -> list[tuple[str, str]]:
    """Return the pairs of spans that share a character in the text."""
    return [
        (a, b)
        for a in first
        for b in second
        if any(s < v and u < e for s, e in ranges(text, a) for u, v in ranges(text, b))
    ]


def bad_spans(text: str, spans: list[str]) -> list[str]:
    """Return the spans that are too short or not verbatim in the text."""
    return [span for span in spans if len(span) < 2 or span not in text]


def repeated(values: list[str]) -> list[str]:
    """Return the values that occur more than once."""
    return [value for value, count in Counter(values).items() if count > 1]


def report(problems: list[str]) -> None:
    """Fail with one line for each problem."""
    assert not problems, "\n" + "\n".join(problems)


def test_instruction_fields(instruction: list[dict[str, Any]]) -> None:
    problems = []
    for sample in instruction:
        name = sample.get("id", "?")
        if set(sample) != INSTRUCTION_FIELDS:
            problems.append(f"{name}: fields {sorted(sample)}")
            continue
        problems += [
            f"{name}: empty {key}"
            for key in ("prompt", "reason", "response")
            if not sample[key].strip()
        ]
        if "<think>" in json.dumps(sample) or "</think>" in json.dumps(sample):
            problems.append(f"{name}: holds a think marker")
        if not 40 <= len(sample["reason"].split()) <= 150:
            problems.append(f"{name}: reason has {len(sample['reason'].split())} words")
        if not 1 <= len(sample["related_prompt_list"]) <= 3:
            problems.append(f"{name}: {len(sample['related_prompt_list'])} instructions")
        problems += [
            f"{name}: fields of an instruction {sorted(part)}"
            for part in sample["related_prompt_list"]
            if set(part) != RELATED_FIELDS
        ]
    report(problems)


def test_instruction_counts(instruction: list[dict[str, Any]]) -> None:
    assert len(instruction) >= 320
    kinds = Counter(
        part["instruction_id"] for sample in instruction for part in sample["related_prompt_list"]
    )
    assert len(kinds) == 27
    assert set(own.RULES) <= set(kinds)
    report([f"{kind}: only {count} samples" for kind, count in kinds.items() if count < 12])


def test_instruction_unique(instruction: list[dict[str, Any]]) -> None:
    for key in ("id", "prompt", "response"):
        report(
            [
                f"{key} repeated: {value}"
                for value in repeated([sample[key] for sample in instruction])
            ]
        )


def test_instruction_spans_verbatim(instruction: list[dict[str, Any]]) -> None:
    problems = []
    for sample in instruction:
        name, prompt, response = sample["id"], sample["prompt"], sample["response"]
        found = [(prompt, "prompt", p["prompt_spans"]) for p in sample["related_prompt_list"]]
        found += [
            (response, "response", p["response_spans"]) for p in sample["related_prompt_list"]
        ]
        problems += [f"{name}: no {what} span" for _, what, spans in found if not spans]
        found += [
            (response, "unrelated", p["unrelated_response_spans"])
            for p in sample["related_prompt_list"]
        ]
        found.append((response, "unrelated", sample["unrelated_response_spans"]))
        for text, what, spans in found:
            problems += [f"{name}: {what} span {span!r}" for span in bad_spans(text, spans)]
    report(problems)


def test_instruction_spans_do_not_overlap(instruction: list[dict[str, Any]]) -> None:
    problems = []
    for sample in instruction:
        response = sample["response"]
        for part in sample["related_prompt_list"]:
            for unrelated in (part["unrelated_response_spans"], sample["unrelated_response_spans"]):
                problems += [
                    f"{sample['id']} {part['instruction_id']}: {a!r} overlaps {b!r}"
                    for a, b in overlaps(response, part["response_spans"], unrelated)
                ]
    report(problems)


def check(kind: str, kwargs: dict[str, Any], response: str) -> bool:
    (found,) = follows(Asked("here", "", (Instruction(kind, kwargs),)), response)
    return found


@needs_rules
def test_instruction_rules_hold(instruction: list[dict[str, Any]]) -> None:
    report(
        [
            f"{sample['id']}: {part['instruction_id']} {part['kwargs']} does not hold"
            for sample in instruction
            for part in sample["related_prompt_list"]
            if not check(part["instruction_id"], part["kwargs"], sample["response"])
        ]
    )


@pytest.mark.parametrize(
    ("kind", "kwargs", "response"),
    [
        ("length:exact_sentences", {"sentences": 2}, "One. Two. Three."),
        ("keyword:exact_count", {"keyword": "cat", "count": 2}, "cat catalogue"),
        ("format:json", {"keys": ["a"]}, '{"b": 1}'),
        ("format:json", {"keys": ["a"]}, 'Here: {"a": 1}'),
        ("format:numbered_list", {"items": 2}, "1. one\n3. three"),
        ("format:sections", {"headings": ["A", "B"]}, "B\nA"),
        ("start:phrase", {"phrase": "Well"}, "Oh well"),
        ("paragraphs:exact", {"paragraphs": 2}, "one\ntwo"),
        ("separator:two_responses", {"separator": "***"}, "same\n***\nsame"),
        (
            "table:markdown",
            {"columns": ["A", "B"], "rows": 2},
            "| A | B |\n| --- | --- |\n| 1 | 2 |",
        ),
    ],
)
def test_our_rules_refuse_violations(kind: str, kwargs: dict[str, Any], response: str) -> None:
    assert not check(kind, kwargs, response)


def test_reasoning_fields(reasoning: list[dict[str, Any]]) -> None:
    problems = []
    for sample in reasoning:
        name = sample.get("id", "?")
        missing = REASONING_FIELDS - set(sample)
        if missing:
            problems.append(f"{name}: lacks {sorted(missing)}")
            continue
        problems += [f"{name}: empty {key}" for key in REASONING_FIELDS if not sample[key].strip()]
        if len(sample["reasoning"]) < 300:
            problems.append(f"{name}: reasoning has {len(sample['reasoning'])} characters")
        if any(mark in sample[key] for mark in ("<think>", "</think>") for key in REASONING_FIELDS):
            problems.append(f"{name}: holds a think marker")
    report(problems)


def test_reasoning_counts(reasoning: list[dict[str, Any]]) -> None:
    assert len(reasoning) >= 60
    assert len({sample["domain"] for sample in reasoning}) >= 5
    for key in ("id", "prompt"):
        report(
            [
                f"{key} repeated: {value}"
                for value in repeated([sample[key] for sample in reasoning])
            ]
        )


def test_sets_share_no_prompt(
    instruction: list[dict[str, Any]], reasoning: list[dict[str, Any]]
) -> None:
    both = {sample["prompt"] for sample in instruction} & {sample["prompt"] for sample in reasoning}
    report([f"prompt in both sets: {prompt}" for prompt in sorted(both)])
