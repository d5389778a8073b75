"""`mergekit-rain data instruction` and `data check`: rules, spans, and what is shown of a set."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from commands import TRIO, needs_rules, refused, run, succeed
from watching import untouched

from rain_mergekit.data_building.marking import _CUES, prompt_spans, response_spans
from rain_mergekit.instructions import own, public_rules
from rain_mergekit.models.loading import LoadOptions, open_checkpoint
from rain_mergekit.models.tokenizer import load_tokenizer
from rain_mergekit.text.calibration_sets import load_instruction

REASONING = TRIO / "reasoning"
SHIPPED = Path(__file__).parents[2] / "calibration" / "instruction.jsonl"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, samples: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


# Marking


@pytest.mark.parametrize(
    ("kind", "kwargs", "response", "follows", "unrelated"),
    [
        ("change_case:english_capital", {}, "IT IS GREEN.", ["IT IS GREEN."], []),
        (
            "keywords:existence",
            {"keywords": ["cat", "Dog"]},
            "A cat met a dog. They ran.",
            ["cat", "dog"],
            ["A", "met a", ". They ran."],
        ),
        (
            "keywords:existence",
            {"keywords": ["cat"]},
            "No category: cat!",
            ["cat!"],
            ["No category:"],
        ),
        ("keywords:existence", {"keywords": ["cat"]}, "A category", ["category"], ["A"]),
        ("format:json", {"keys": ["a", "b"]}, '{"a": 1, "b": 2}', ['"a":', '"b":'], ["1,", "2}"]),
        (
            "detectable_format:number_bullet_lists",
            {"num_bullets": 2},
            "So:\n- one\n- two\nDone.",
            ["- one", "- two"],
            ["So:", "Done."],
        ),
        ("detectable_format:title", {}, "<<Tea>>\nIt is hot.", ["<<Tea>>"], ["It is hot."]),
        ("start:phrase", {"phrase": "Well,"}, "Well, yes.", ["Well,"], ["yes."]),
        ("startend:end_checker", {"end_phrase": "bye."}, "It is 7. Bye.", ["Bye."], ["It is 7."]),
        (
            "detectable_content:postscript",
            {"postscript_marker": "P.S."},
            "Hi.\n\nP.S. Ho.",
            ["P.S. Ho."],
            ["Hi."],
        ),
        (
            "detectable_format:number_highlighted_sections",
            {"num_highlights": 1},
            "Be *very* kind",
            ["*very*"],
            ["Be", "kind"],
        ),
        ("separator:two_responses", {"separator": "***"}, "a\n***\nb", ["***"], ["a", "b"]),
        (
            "keywords:letter_frequency",
            {"letter": "z", "let_frequency": 1, "let_relation": "at least"},
            "a zoo here",
            ["zoo"],
            ["a", "here"],
        ),
        (
            "keywords:letter_frequency",
            {"letter": "z", "let_frequency": 2, "let_relation": "less than"},
            "a zoo here",
            ["a zoo here"],
            [],
        ),
        (
            "detectable_format:multiple_sections",
            {"section_spliter": "Part", "num_sections": 2},
            "Part 1\nyes\nPart 2\nno",
            ["Part 1", "Part 2"],
            ["yes", "no"],
        ),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
            "One came.\n\nThen two.",
            ["Then"],
            ["One came.", "two."],
        ),
    ],
)
def test_response_is_marked_by_rule(
    kind: str, kwargs: dict[str, Any], response: str, follows: list[str], unrelated: list[str]
) -> None:
    assert response_spans(kind, kwargs, response) == (follows, unrelated)


def test_every_kind_is_marked_where_people_marked_it() -> None:
    """Against the shipped set's own marks: found by rule in most of 730 cases."""
    prompts, responses, kinds = 0, 0, set()
    total = 0
    for sample in lines(SHIPPED):
        for item in sample["related_prompt_list"]:
            kind, kwargs = item["instruction_id"], item["kwargs"]
            kinds.add(kind)
            total += 1
            said = prompt_spans(kind, kwargs, sample["prompt"])
            follows, unrelated = response_spans(kind, kwargs, sample["response"])
            assert all(span in sample["prompt"] for span in said)
            assert follows
            assert all(span in sample["response"] for span in follows + unrelated)
            prompts += shares(sample["prompt"], item["prompt_spans"], said) > 0.5
            responses += shares(sample["response"], item["response_spans"], follows) > 0.5
    assert len(kinds) == 27
    assert total == 730
    assert prompts > 0.9 * total
    assert responses > 0.92 * total


def shares(text: str, wanted: list[str], found: list[str]) -> float:
    """How much of the characters in `wanted` are in `found` too."""
    first, second = characters(text, wanted), characters(text, found)
    return len(first & second) / len(first)


def characters(text: str, spans: list[str]) -> set[int]:
    return {
        place
        for span in spans
        for match in re.finditer(f"(?={re.escape(span)})", text)
        for place in range(match.start(), match.start() + len(span))
    }


@needs_rules
def test_the_page_lists_every_rule_with_its_arguments() -> None:
    page = (Path(__file__).parents[2] / "docs" / "building-data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+:\w+)` \| (.*?) \|", page, re.MULTILINE)
    listed = {kind: set(re.findall(r"`(\w+)`", told)) - {"de"} for kind, told in rows}
    rules = public_rules.ifeval("here")
    known = {kind: set(rules[kind](kind).get_instruction_args_keys()) for kind in rules}
    assert listed == {**known, **{kind: set(names) for kind, names in own.ARGUMENTS.items()}}


@needs_rules
def test_every_rule_can_be_marked() -> None:
    assert set(_CUES) == {*own.RULES, *public_rules.ifeval("here")}
    assert set(own.ARGUMENTS) == set(own.RULES)


@pytest.mark.parametrize(
    ("kind", "kwargs", "prompt", "expected"),
    [
        (
            "length_constraints:number_words",
            {"num_words": 13, "relation": "less than"},
            "Tell me. Use at most twelve words. No words of wisdom.",
            ["Use at most twelve words."],
        ),
        (
            "detectable_content:postscript",
            {"postscript_marker": "P.S."},
            "Hi. Add P.S. at the end.",
            ["Add P.S. at the end."],
        ),
        (
            "language:response_language",
            {"language": "fr"},
            "Hello? En français.",
            ["En français."],
        ),
        ("change_case:english_capital", {}, "What is it?", []),
    ],
)
def test_instruction_is_found_in_the_prompt(
    kind: str, kwargs: dict[str, Any], prompt: str, expected: list[str]
) -> None:
    assert prompt_spans(kind, kwargs, prompt) == expected


# The command


def constrained(folder: Path) -> Path:
    """Of these the model, which heeds no constraint, follows the first two by nature."""
    texts = [item["prompt"] for item in lines(TRIO / "test.jsonl") if not item["constraint"]]
    kinds: list[tuple[str, dict[str, Any], str]] = [
        ("start:phrase", {"phrase": "answer :"}, "use brackets ."),
        ("punctuation:no_comma", {}, "end with moon ."),
        ("change_case:english_capital", {}, "use uppercase ."),
    ]
    found = [
        {
            "prompt": f"{text} {said}",
            "related_prompt_list": [
                {"instruction_id": kind, "kwargs": kwargs, "prompt_spans": [said]}
            ],
        }
        for text, (kind, kwargs, said) in zip(texts, kinds, strict=False)
    ]
    return write(folder / "constraints.jsonl", found)


@needs_rules
def test_only_answers_that_follow_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "set.jsonl"
    prompts = constrained(tmp_path)
    command = ("data", "instruction", "--model", REASONING, "--prompts", prompts, "-o", out)
    with untouched(TRIO, prompts):
        said = succeed(*command, "--max-new-tokens", 96)
    assert "1 does not follow change_case:english_capital" in said
    first, second = sorted(lines(out), key=lambda item: str(item["related_prompt_list"]))[::-1]
    (mark,) = first["related_prompt_list"]
    assert mark["instruction_id"] == "start:phrase"
    assert mark["kwargs"] == {"phrase": "answer :"}
    assert mark["response_spans"] == ["answer :"]
    assert len(mark["unrelated_response_spans"]) == 1
    assert second["related_prompt_list"][0]["prompt_spans"] == ["end with moon ."]
    tokenizer = load_tokenizer(open_checkpoint(str(REASONING), LoadOptions()))
    data = load_instruction(out, tokenizer)
    assert (len(data.samples), data.skipped) == (2, ())
    spans = next(s for s in data.samples if s.spans[0].instruction_id == "start:phrase").spans[0]
    assert len(spans.related) == 2
    assert spans.unrelated


@needs_rules
@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"instruction_id": "case:camel"}, "there is no rule 'case:camel' (known: change_case:"),
        ({"instruction_id": "paragraphs:exact"}, "must be a whole number, found nothing"),
        (
            {"instruction_id": "paragraphs:exact", "kwargs": {"paragraphs": 1.5}},
            "related_prompt_list[0]: paragraphs must be a whole number, found 1.5",
        ),
        (
            {"instruction_id": "format:json", "kwargs": {"keys": "cat"}},
            "must be a list of texts",
        ),
        (
            {"instruction_id": "start:phrase", "kwargs": {"phrase": "a", "word": "b"}},
            "rule 'start:phrase' does not know 'word'",
        ),
        (
            {"instruction_id": "keywords:existence", "kwargs": {"keywords": ["(c"]}},
            "rule 'keywords:existence': missing )",
        ),
        (
            {"instruction_id": "language:response_language", "kwargs": {"language": "xx"}},
            "rule 'language:response_language' does not know 'xx'",
        ),
        (
            {"instruction_id": "punctuation:no_comma", "prompt_spans": ["SHOUT"]},
            "has a text that is not in the prompt: 'SHOUT'",
        ),
        ({"instruction_id": "punctuation:no_comma"}, "no sentence of the prompt was found"),
    ],
)
def test_constraints_that_cannot_be_read(item: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [{"prompt": "Say it.", "related_prompt_list": [item]}])
    command = ("data", "instruction", "--model", REASONING, "--prompts", path)
    assert words in refused(tmp_path, *command, "-o", tmp_path / "set.jsonl")


def test_prompt_without_constraint_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [{"prompt": "Say it.", "related_prompt_list": []}])
    command = ("data", "instruction", "--model", REASONING, "--prompts", path)
    assert "it names no instruction" in refused(tmp_path, *command)


@needs_rules
def test_prompts_in_the_layout_of_ifeval(tmp_path: Path) -> None:
    """The instruction's text is found by rule; where it is not, that prompt alone is left out."""
    first = next(item for item in lines(TRIO / "test.jsonl") if not item["constraint"])
    found = [
        {
            "key": number,
            "prompt": f"{first['prompt']} {said}",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{"num_words": None}],
        }
        for number, said in enumerate(["use no comma .", "please ."])
    ]
    out = tmp_path / "set.jsonl"
    prompts = write(tmp_path / "ifeval.jsonl", found)
    command = ("data", "instruction", "--model", REASONING, "--prompts", prompts, "-o", out)
    said = succeed(*command, "--max-new-tokens", 96)
    assert f"{prompts}:2: left out: no sentence of the prompt was found that gives punct" in said
    ((mark,),) = (item["related_prompt_list"] for item in lines(out))
    assert mark["instruction_id"] == "punctuation:no_comma"
    assert mark["prompt_spans"][0].endswith("use no comma .")


# check


def test_check_with_the_models_own_tokenizer(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", lines(TRIO / "instruction.jsonl")[:5])
    said = succeed("data", "check", path, "--model", REASONING)
    assert "instruction set, 5 of 5 samples usable" in said
    assert "tokens, half of them below" in said
    assert "\nmarker: <think> | </think>\n" in said
    assert "\ninstruction: capitals only .\n" in said
    assert "\nfollows: NINE LEAVES\n" in said
    assert "\nunrelated: answer :\n" in said
    assert "\x1b[" not in said
    assert "Sample" not in succeed("data", "check", path, "--show", 0)


def test_check_shows_colours_where_they_are_wanted(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", lines(TRIO / "instruction.jsonl")[:2])
    said = succeed("data", "check", path, color=True)
    assert "\x1b[32m\x1b[1mNINE LEAVES\x1b[0m" in said
    assert "\x1b[36m\x1b[1mcapitals only .\x1b[0m" in said
    assert "\x1b[" not in succeed("data", "check", path, color=True, env={"NO_COLOR": "1"})


def test_check_without_a_tokenizer(tmp_path: Path) -> None:
    samples = lines(SHIPPED)[:2]
    said = succeed("data", "check", write(tmp_path / "set.jsonl", samples))
    assert "instruction set, 2 of 2 samples usable" in said
    assert "characters, half" in said


def test_check_lists_what_would_be_skipped(tmp_path: Path) -> None:
    good = {"prompt": "Hi", "output": "[a]hmm[b] Ho \x1b[31m"}
    bad = {"prompt": "Hi", "output": "[a]no end"}
    path = write(tmp_path / "set.jsonl", [bad, good])
    said = succeed("data", "check", path, "--markers", "[a]", "[b]")
    assert "reasoning set, 1 of 2 samples usable" in said
    assert re.search(r"set.jsonl:1: skipped: the block is not closed by '\[b\]'", said)
    assert "\\x1b[31m" in said
    assert "none of its 2 samples can be used" in refused(tmp_path, "data", "check", path)
    outcome = run("data", "check", path, "--markers", "[a]", "[b]", "--show", 2)
    assert outcome.code == 1
    assert "there are 1 usable samples" in outcome.output


def test_check_refuses_a_mixture(tmp_path: Path) -> None:
    samples = [lines(TRIO / "reasoning.jsonl")[0], lines(TRIO / "instruction.jsonl")[0]]
    path = write(tmp_path / "set.jsonl", samples)
    assert "some samples have 'related_prompt_list'" in refused(tmp_path, "data", "check", path)
