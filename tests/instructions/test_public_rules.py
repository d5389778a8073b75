"""IFBench's rules, and instructions that the thinking must follow, as ReasonIF has them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import needs_rules, run, succeed
from hangs import HANGS
from scripted_server import serving

from rain_mergekit.data_building.constraints import read_constrained
from rain_mergekit.data_building.tasks import Written
from rain_mergekit.errors import RainError
from rain_mergekit.evaluation.answer_measures import faults, measure, reading_of
from rain_mergekit.instructions import own, public_rules
from rain_mergekit.instructions.prompts import Asked, Instruction
from rain_mergekit.instructions.rules import check_rules, follows
from rain_mergekit.text.markers import Markers

pytestmark = needs_rules

# Of each kind of IFBench's that has data of its own or none: a text that follows and one that does
# not, by what the instruction says.
IFBENCH: list[tuple[str, dict[str, Any], str, str]] = [
    ("count:word_count_range", {"min_words": 3, "max_words": 4}, "One two three.", "One two."),
    ("count:unique_word_count", {"N": 3}, "one two three", "one two two"),
    ("count:numbers", {"N": 2}, "From 3 to 14.", "Only 3."),
    ("words:palindrome", {}, "civic level radar rotor refer kayak stats tenet madam solos", "none"),
    ("words:prime_lengths", {}, "so the merge", "a merged model"),
    ("words:no_consecutive", {}, "all big cats", "all apples"),
    ("format:options", {"options": "yes/no/maybe"}, "Maybe.", "It may be so."),
    ("format:newline", {}, "each\nword\nalone", "not so\nhere"),
    ("format:no_whitespace", {}, "together", "a part"),
    ("repeat:repeat_span", {"prompt_to_repeat": "a b c d", "n_start": 1, "n_end": 3}, "b c", "b"),
]  # fmt: skip


def asked(kind: str, arguments: dict[str, Any]) -> Asked:
    return Asked("p:1", "?", (Instruction(kind, arguments),))


@pytest.mark.parametrize(("kind", "arguments", "good", "bad"), IFBENCH, ids=[c[0] for c in IFBENCH])
def test_ifbench(kind: str, arguments: dict[str, Any], good: str, bad: str) -> None:
    assert [follows(asked(kind, arguments), text) for text in (good, bad, "")] == [
        [True],
        [False],
        [False],
    ]


def outcome(kind: str, text: str) -> str:
    try:
        return str(follows(asked(kind, {}), text))
    except RainError as error:
        return str(error)


@pytest.mark.parametrize("text", ["?", "...", "1", " \n", "()"])
def test_a_text_that_a_rule_does_not_foresee_does_not_follow_it(text: str) -> None:
    """Some of IFBench's look at words that are not there, or divide by their number."""
    rules = public_rules.ifbench("here").items()
    kinds = [kind for kind, rule in rules if not rule(kind).get_instruction_args_keys()]
    assert len(kinds) > 25
    for kind in kinds:
        said = outcome(kind, text)
        assert said in {"[True]", "[False]"} or "needs data of nltk" in said


def test_nothing_is_fetched_by_loading_the_rules() -> None:
    """In a process of its own: the library would ask for four data sets as it is imported."""
    program = (
        "import nltk\n"
        "def fetch(*a, **k): raise AssertionError('fetched')\n"
        "nltk.download = fetch\n"
        "from rain_mergekit.instructions import public_rules\n"
        "assert len(public_rules.ifbench('here')) == 58\n"
        "assert nltk.download is fetch\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=HANGS)


def test_names_are_of_one_set_only() -> None:
    groups = [set(public_rules.ifeval("a")), set(public_rules.ifbench("a")), set(own.RULES)]
    assert sum(map(len, groups)) == len(set.union(*groups))


def test_the_page_lists_all_of_ifbench_with_arguments() -> None:
    page = (Path(__file__).parents[2] / "docs" / "building-data.md").read_text(encoding="utf-8")
    listed = {
        f"{group}:{name}": set(re.findall(r"`(\w+)`", arguments))
        for group, names in re.findall(r"^\| `(\w+):` \| (.*?) \|$", page, re.MULTILINE)
        for name, arguments in re.findall(r"`([\w-]+)`(?: \(((?:`\w+`(?:, )?)+)\))?", names)
    }
    rules = public_rules.ifbench("here")
    assert listed == {kind: set(rules[kind](kind).get_instruction_args_keys()) for kind in rules}


# The thinking

# ReasonIF's six kinds.
THOUGHT = {
    "thinking:punctuation:no_comma": ({}, "one two", "one, two"),
    "thinking:length_constraints:number_words": (
        {"num_words": 3, "relation": "less than"},
        "one two",
        "one two three",
    ),
    "thinking:startend:end_checker": ({"end_phrase": "Done."}, "one two Done.", "one two"),
    "thinking:detectable_format:json_format": ({}, '{"one": 2}', "one"),
    "thinking:change_case:english_capital": (
        {},
        "THIS IS ONE LONG SENTENCE IN ENGLISH",
        "This is one long sentence in English",
    ),
    "thinking:language:response_language": (
        {"language": "de"},
        "Das ist ein langer Satz auf Deutsch, damit man es sieht.",
        "This is a long sentence in English, so that one can see it.",
    ),
}


@pytest.mark.parametrize("kind", THOUGHT)
def test_instructions_for_the_thinking(kind: str) -> None:
    arguments, good, bad = THOUGHT[kind]
    prompt, how = asked(kind, arguments), reading_of([], Markers(), opens=False)

    def seen(text: str) -> tuple[object, list[str]]:
        found = measure(prompt, Written(text, None, finished=True), how)
        assert found.followed is None
        return found.heeded, list(faults(found))

    assert seen(f"<think>{good}</think>{bad}") == ((True,), [])
    assert seen(f"<think>{bad}</think>{good}") == ((False,), ["thinking not as told"])
    assert seen(good) == ((False,), ["no thinking block", "thinking not as told"])
    assert seen(f"<think>{good}") == ((False,), ["block never closed", "thinking not as told"])


def test_both_are_told_apart() -> None:
    rules = ("start:phrase", "thinking:start:phrase")
    prompt = Asked("p:1", "?", tuple(Instruction(kind, {"phrase": "So"}) for kind in rules))
    how = reading_of([], Markers(), opens=False)
    found = measure(prompt, Written("<think>So x</think>It is", None, finished=True), how)
    assert (found.followed, found.heeded) == ((False,), (True,))
    taken = measure(prompt, Written("So it is", "Now", finished=True), how)
    assert (taken.followed, taken.heeded) == ((True,), (False,))


def test_rules_that_are_not_there() -> None:
    with pytest.raises(
        RainError, match=r"there is no rule 'no:such' .*count:numbers.*start:phrase"
    ):
        check_rules([asked("thinking:no:such", {})])
    with pytest.raises(RainError, match="needs N in `kwargs`"):
        check_rules([asked("count:numbers", {})])


def test_a_set_is_built_from_instructions_for_the_response_alone(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    ids = (["thinking:punctuation:no_comma"], ["punctuation:no_comma"])
    rows = [{"prompt": f"{i}: no comma.", "instruction_id_list": one} for i, one in enumerate(ids)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_constrained(path)
    assert [prompt.text for prompt in found.prompts] == ["1: no comma."]
    assert "an instruction for the thinking" in found.left_out[0][1]


def test_compare_shows_that_the_thinking_is_no_longer_as_told(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rule = {"instruction_id_list": ["thinking:punctuation:no_comma"], "kwargs": [{}]}
    rows = [
        {"prompt": f"{i} + 1? Think without commas.", "answer": i + 1, **rule} for i in range(9)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def writes(thinking: str) -> Callable[[str], str]:
        return lambda text: f"<think>\n{thinking}\n</think>\n\n{int(text.split()[0]) + 1}"

    for name, thinking in (("before", "Add one."), ("after", "Well, add one.")):
        with serving(writes(thinking)) as server:
            how = ("--server", server.url, "--prompts", prompts)
            said = succeed("ask", "m", *how, "-o", tmp_path / f"{name}.jsonl")
    assert re.search(r"^thinking not as told +9/9$", said, re.MULTILINE)
    files = [tmp_path / f"{name}.jsonl" for name in ("before", "after")]
    found = run("compare", *files, "--bound", "heeded=5", "--bound", "correct=5", "--json")
    assert found.code == 3
    assert json.loads(found.stdout)["pairs"][0]["bounds_broken"] == ["heeded"]
