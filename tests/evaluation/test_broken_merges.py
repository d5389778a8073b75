"""Merges that are broken on purpose, each in one way that users complain of, and a good one.

The models are transformers built by hand; each merge is mergekit's own task arithmetic of the
reasoning model and one that does the thing, and what it writes is what its weights make it write.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import run, succeed
from merging import merge
from scripted_model import Script, vocabulary, write_model

from rain_mergekit.evaluation.comparison import METRICS

PHRASE, COUNT = "Answer:", 12
CHINESE = "\n\u56e0\u4e3a\u8fd9\u662f\u7b54\u6848"
AGAIN = " Wait, let me check that again."


def prompt(number: int) -> str:
    return f"What is {number} + 4? Begin with {PHRASE}"


def good(number: int) -> Script:
    return ("<think>", f"\nAdd four to {number}.", "\n", "</think>", f"\n\nAnswer: {number + 4}.")


def unclosed(number: int) -> Script:
    return good(number)[:2]


def looping(number: int) -> Script:
    return (*good(number)[:2], AGAIN, AGAIN)


def repeating(number: int) -> Script:
    return (*good(number), f" So it is {number + 4}.", " As I said.", " As I said.")


def long(number: int) -> Script:
    return (*good(number)[:2], *(f" And so, {step}." for step in range(1200)), *good(number)[2:])


def empty(number: int) -> Script:
    return ("<think>", "\n", "</think>", good(number)[-1])


def several(number: int) -> Script:
    return (*good(number)[:4], "\n\n<think>\nOnce more.\n</think>", good(number)[-1])


def blockless(number: int) -> Script:
    return (good(number)[-1].strip(),)


def foreign(number: int) -> Script:
    return ("<think>", CHINESE, *good(number)[2:])


def disobedient(number: int) -> Script:
    return (*good(number)[:4], f"\n\nIt is {number + 4}.")


def wrong(number: int) -> Script:
    return (*good(number)[:4], f"\n\nAnswer: {number + 5}.")


# What a merge does, the faults that `ask` counts in all of its answers, the metric of `compare`
# that is worse, and what `verify` says.
BROKEN: dict[str, tuple[Callable[[int], Script], list[str], str, str]] = {
    "loops that never close": (
        looping,
        ["cut off while thinking", "loop", "wrong answer", "instruction not followed"],
        "looped",
        "loops 12 of 12, before 0 of 12",
    ),
    "answers that repeat": (
        repeating,
        ["answer cut off", "loop"],
        "looped",
        "loops 12 of 12, before 0 of 12",
    ),
    "thousands of tokens": (long, [], "tokens", "tokens of the typical answer 1206, before 6"),
    "never closed": (
        unclosed,
        ["block never closed", "wrong answer", "instruction not followed"],
        "unclosed",
        "broken blocks 12 of 12, before 0 of 12",
    ),
    "several blocks": (
        several,
        ["several blocks"],
        "several",
        "several blocks 12 of 12, before 0 of 12",
    ),
    "empty block": (empty, ["empty block"], "empty", "broken blocks 12 of 12, before 0 of 12"),
    "no block": (
        blockless,
        ["no thinking block"],
        "whole",
        "broken blocks 12 of 12, before 0 of 12",
    ),
    "wrong language": (
        foreign,
        ["other language"],
        "switched",
        "other language 12 of 12, before 0 of 12",
    ),
    "outside the format": (
        disobedient,
        ["instruction not followed"],
        "followed",
        "instructions followed 0 of 12, before 12 of 12",
    ),
    "wrong": (wrong, ["wrong answer"], "correct", "right answers 0 of 12, before 12 of 12"),
}


def merged_with(writes: Callable[[int], Script], folder: Path) -> tuple[Path, Path]:
    """The reasoning model, and its merge with one that writes as told."""
    own, other = ({prompt(i): kind(i) for i in range(COUNT)} for kind in (good, writes))
    words = vocabulary([own, other])
    parents = [write_model(folder / name, script, words) for name, script in
               (("reasoning", own), ("other", other))]  # fmt: skip
    content = {
        "merge_method": "task_arithmetic",
        "base_model": str(parents[0]),
        "models": [{"model": str(parents[1]), "parameters": {"weight": 1.0}}],
        "dtype": "float32",
    }
    outcome = merge(folder, content)
    assert outcome.code == 0, outcome.output
    return parents[0], outcome.folder


def prompts(folder: Path) -> Path:
    rule = {"instruction_id_list": ["start:phrase"], "kwargs": [{"phrase": PHRASE}]}
    path = folder / "prompts.jsonl"
    rows = [{"prompt": prompt(i), "answer": i + 4, **rule} for i in range(COUNT)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(
    models: tuple[Path, Path], folder: Path, *how: object
) -> tuple[dict[str, Any], Path, Path]:
    """What `ask --json` says of the merge, and the files of both models' answers."""
    files = (folder / "before.jsonl", folder / "after.jsonl")
    for model, path in zip(models, files, strict=True):
        said = succeed("ask", model, "-o", path, "--prompts", prompts(folder), *how, "--json")
    return json.loads(said[said.index("{") :]), *files


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if "thousands" in n else n for n in BROKEN]
)
def test_what_is_broken_is_named(name: str, tmp_path: Path) -> None:
    writes, faults, metric, reason = BROKEN[name]
    models = merged_with(writes, tmp_path)
    limit = ("--max-new-tokens", 1300 if writes is long else 64)
    summary, *files = asked(models, tmp_path, *limit, "--batch-size", COUNT)
    counted = {fault: (n["count"], n["of"]) for fault, n in summary["faults"].items() if n["count"]}
    assert counted == dict.fromkeys(faults, (COUNT, COUNT))

    outcome = run("compare", *files, f"--bound={metric}=5", "--json")
    assert outcome.code == 3
    (pair,) = json.loads(outcome.stdout)["pairs"]
    assert pair["bounds_broken"] == [metric]
    verdicts = {item["metric"]: item["verdict"] for item in pair["differences"]}
    assert verdicts[metric] == ("more" if metric == "tokens" else "worse")

    against = ("--against", models[0], "--prompts", prompts(tmp_path), "--generate", COUNT, *limit)
    outcome = run("verify", models[1], *against, "--json")
    found = json.loads(outcome.stdout)
    assert reason in found["worse"]
    assert found["verdict"] == ("at risk" if writes is long else "damaged")
    assert outcome.code == (0 if writes is long else 3)


def test_a_good_merge_passes(tmp_path: Path) -> None:
    models = merged_with(lambda i: (*good(i)[:1], f"\n{i} and four.", *good(i)[2:]), tmp_path)
    summary, *files = asked(models, tmp_path, "--max-new-tokens", 64)
    assert not any(fault["count"] for fault in summary["faults"].values())
    bounds = [f"--bound={metric.name}=1" for metric in METRICS if metric.good]
    said = succeed("compare", *files, *bounds, "--bound", "tokens=1")
    assert "worse" not in said
    limit = ("--prompts", prompts(tmp_path), "--generate", COUNT, "--max-new-tokens", 64)
    said = succeed("verify", models[1], "--against", models[0], *limit)
    assert "Verdict: the thinking format is kept" in said
    assert "right 12 of 12 (before 12); followed 12 of 12 (before 12)" in said
