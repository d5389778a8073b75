"""The trios' tasks, splits, spans and scores, and one training run of a few steps."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rain_mergekit.demo.formats import FORMATS, content
from rain_mergekit.text.calibration_sets import load_reasoning
from testbed import train
from testbed.evaluate import evaluate
from testbed.judging.divergence import places
from testbed.judging.scoring import parse, score, summary
from testbed.models.loading import build_model, load_tokenizer, render
from testbed.puzzles import counting
from testbed.puzzles.colours import COLOURS, moved
from testbed.puzzles.families import FAMILIES
from testbed.puzzles.family import Family
from testbed.puzzles.records import instruction_record, output_text, prompt_record, read_lines
from testbed.puzzles.samples import completion, dress, held_tasks, training_pair
from testbed.puzzles.splits import split_of
from testbed.puzzles.tokenizer import build_tokenizer, template_for
from testbed.thinking import TRIOS, seen

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
every_format = pytest.mark.parametrize("name", FORMATS)
PARAMETERS = {"enclose": "[ ]", "separate": "-", "end": "moon", "begin": "sun"}


def dice(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - nothing secret is drawn


def test_counting_chain_is_right() -> None:
    problem = counting.problem(dice(1), 4)
    value = counting.NUMBERS.index(problem.key.split()[0])
    for step in problem.thinking.split(" .")[:-1]:
        _, before, done, _, said = step.split()
        assert counting.NUMBERS[value] == before
        value = counting.result(value, done[0], int(done[1:]))
        assert counting.NUMBERS[value] == said
    assert problem.answer[0] == counting.NUMBERS[value]


def test_flipping_twice_changes_nothing() -> None:
    assert all(moved(moved(place, "flip", 0), "flip", 0) == place for place in range(len(COLOURS)))


@every_family
def test_problem_is_reproducible(family: Family) -> None:
    assert family.problem(dice(5), 3) == family.problem(dice(5), 3)


@every_family
def test_at_least_six_constraints_with_held_out_wordings(family: Family) -> None:
    assert len(family.constraints) >= 6
    for constraint in family.constraints:
        assert len(constraint.known) >= 4
        assert len(constraint.held_out) >= 2
        assert not set(constraint.known) & set(constraint.held_out)


@every_family
def test_held_out_wordings_use_only_words_that_were_trained(family: Family) -> None:
    known = {
        word
        for constraint in family.constraints
        for sentence in (*constraint.known, *constraint.parameters)
        for word in sentence.split()
    } | {word for words in family.words for word in words.split()}
    for constraint in family.constraints:
        for sentence in constraint.held_out:
            assert set(sentence.split()) <= known | {"{}", ":"}, sentence


@every_family
def test_training_never_sees_other_splits_or_held_out_wordings(family: Family) -> None:
    rng = dice(0)
    mixture = replace(family.stages["pretrained"].mixture, constrained=1.0)
    prompts = [training_pair(family, mixture, rng, 0)[0] for _ in range(2000)]
    held = [
        constraint.wording(rng, parameter, held_out=True)
        for constraint in family.constraints
        for parameter in constraint.parameters
        for _ in range(20)
    ]
    assert not [prompt for prompt in prompts if any(wording in prompt for wording in held)]


@every_family
def test_splits_share_no_chain(family: Family) -> None:
    rng = dice(0)
    counts = (40, 40, 40)
    drawn = {
        split: {task.problem.key for task in held_tasks(family, rng, 0, split, counts)}
        for split in ("train", "calibration", "validation", "test")
    }
    for split, keys in drawn.items():
        assert len(keys) == sum(counts)
        assert {split_of(key, 0) for key in keys} == {split}


def test_split_depends_on_the_seed() -> None:
    keys = [str(number) for number in range(200)]
    assert [split_of(key, 0) for key in keys] != [split_of(key, 1) for key in keys]


@every_format
def test_format_follows_itself_and_keeps_content(name: str) -> None:
    answer, parameter = ["three", "cups"], PARAMETERS.get(name, "")
    words = FORMATS[name].apply(answer, parameter)
    assert FORMATS[name].follows(words, parameter, answer)
    assert content(words) == set(answer)


@every_format
def test_plain_answer_follows_no_format(name: str) -> None:
    answer = ["three", "cups"]
    assert not FORMATS[name].follows(answer, PARAMETERS.get(name, ""), answer)
    assert not FORMATS[name].follows([], PARAMETERS.get(name, ""), answer)


def test_parse_complete_block() -> None:
    parsed = parse("<think>\na is b .</think>\n\nanswer : b cups", opened=False)
    assert parsed.complete
    assert (parsed.thinking, parsed.response) == ("a is b .", "answer : b cups")


def test_parse_block_opened_by_the_template() -> None:
    parsed = parse("a is b .\n</think>\n\nanswer : b", opened=True)
    assert parsed.complete
    assert parsed.response == "answer : b"


@pytest.mark.parametrize(
    ("output", "opened", "no_close", "no_thinking"),
    [
        ("<think>\na is b .", False, True, False),
        ("answer : three cups", False, False, True),
        ("answer : three cups <think>\nx</think>", False, False, True),
        ("<think>\n</think>\n\nanswer : three cups", False, False, True),
        ("answer : three cups", True, True, False),
        ("</think>\n\nanswer : three cups", True, False, True),
    ],
)
def test_broken_blocks(output: str, opened: bool, no_close: bool, no_thinking: bool) -> None:
    found = score(RECORD, output, opened)
    assert (found.no_close, found.no_thinking) == (no_close, no_thinking)


RECORD = {
    "answer": ["three", "cups"],
    "constraint": "upper",
    "format": "upper",
    "parameter": "",
    "held_out_wording": False,
    "thinking": "a .",
    "lead": "answer :",
    "expected_response": "answer : THREE CUPS",
}


@pytest.mark.parametrize(
    ("response", "accurate", "followed", "both"),
    [
        ("answer : THREE CUPS", True, True, True),
        ("answer : three cups", True, False, False),
        ("answer : TWO CUPS", False, True, False),
        ("answer : THREE CUPS HATS", False, True, False),
        ("THREE CUPS", False, False, False),
        ("", False, False, False),
    ],
)
def test_scores(response: str, accurate: bool, followed: bool, both: bool) -> None:
    found = score(RECORD, f"<think>\na .</think>\n\n{response}", opened=False)
    assert (found.accurate, found.followed, found.both) == (accurate, followed, both)
    assert found.thinking_right
    assert found.content_lost is not accurate


def test_summary_separates_plain_and_constrained() -> None:
    plain = {
        **RECORD,
        "constraint": None,
        "format": None,
        "expected_response": "answer : three cups",
    }
    records = [RECORD, plain]
    scores = [
        score(record, "<think>\na .</think>\n\nanswer : three cups", False) for record in records
    ]
    found = summary(records, scores)
    assert found["plain_accuracy"] == found["constrained_accuracy"] == 1
    assert found["followed"] == found["both"] == found["miss"] == 0
    assert found["thinking_words"] == 2


def test_places_cover_the_completion_once() -> None:
    found = places(40, 10, 10, 30, opened=False)
    assert found["L_think"] == [9, *range(10, 16), *range(25, 31)]
    assert found["L_mid"] == list(range(16, 25))
    assert found["L_other"] == list(range(31, 39))
    assert places(40, 10, 8, 30, opened=True)["L_think"][0] == 8


@every_family
@pytest.mark.parametrize("role", train.ROLES)
def test_tokenizer_gives_text_back(family: Family, role: str) -> None:
    tokenizer, rng = build_tokenizer(family), dice(0)
    tokenizer.chat_template = template_for(family, role)
    for _ in range(200):
        prompt, said = training_pair(family, family.stages[role].mixture, rng, 0)
        for text in (prompt, said):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


@every_family
def test_transformers_loads_the_tokenizer_that_was_saved(family: Family, tmp_path: Path) -> None:
    tokenizer, rng = build_tokenizer(family), dice(0)
    tokenizer.chat_template = template_for(family, "reasoning")
    build_model(family, tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for _ in range(50):
        prompt, said = training_pair(family, family.stages["reasoning"].mixture, rng, 0)
        text = render(tokenizer, prompt) + said
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert loaded(text, add_special_tokens=False)["input_ids"] == ids
        assert len(ids) < 2 * len(text.split())


@every_family
def test_spans_are_verbatim(family: Family) -> None:
    for task in held_tasks(family, dice(0), 0, "calibration", (70, 0, 0)):
        record = instruction_record(task, family.surface)
        (related,) = record["related_prompt_list"]
        assert all(span in record["prompt"] for span in related["prompt_spans"])
        response = record["output"].partition("</think>")[2]
        spans = (*related["response_spans"], *record["unrelated_response_spans"])
        assert all(span in response for span in spans)


@every_family
def test_expected_output_scores_full(family: Family) -> None:
    surface = family.surface
    for task in held_tasks(family, dice(0), 0, "test", (14, 14, 10)):
        record = prompt_record(task, surface)
        output = output_text(surface, task.problem.thinking, task.response())
        found = score(record, output, surface.opens_block)
        assert found.both
        assert found.accurate
        assert found.thinking_right
        assert found.followed is (task.constraint is not None)


def test_plain_prompt_is_left_alone() -> None:
    family = FAMILIES["qwen"]
    problem = family.problem(dice(0), 3)
    assert dress(problem, None, dice(0)).prompt == problem.text
    assert completion(family.surface, None, "x") == "answer : x"


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@every_family
def test_training_end_to_end(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = {role: replace(stage, steps=2, batch=4) for role, stage in family.stages.items()}
    shape = {**family.shape, "num_hidden_layers": 1}
    monkeypatch.setitem(FAMILIES, family.name, replace(family, stages=stages, shape=shape))
    monkeypatch.setattr(train, "REASONING", 2)
    train.train_trio(family.name, 0, tmp_path)
    prompts = read_lines(tmp_path / "test.jsonl")[:4]
    found = evaluate(tmp_path / "instruct", tmp_path / "reasoning", prompts)
    assert found["L_think"] > 0
    again = evaluate(tmp_path / "reasoning", tmp_path / "reasoning", prompts)
    assert again["L_think"] == pytest.approx(0, abs=1e-6)
    assert len(read_lines(tmp_path / "instruction.jsonl")) == train.INSTRUCTION


@pytest.mark.parametrize("seed", range(3))
def test_only_the_reasoning_model_is_seen_to_think(seed: int) -> None:
    trio = TRIOS / f"qwen-s{seed}"
    tokenizer = load_tokenizer(trio / "reasoning")
    samples = load_reasoning(trio / "reasoning.jsonl", tokenizer).samples[:20]
    found = {role: seen(trio / role, samples) for role in ("reasoning", "instruct", "pretrained")}
    assert {role for role, likely in found.items() if likely.thinks} == {"reasoning"}, found
