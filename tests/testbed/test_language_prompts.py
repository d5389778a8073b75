"""The real-language testbed: problems, constraints, checks of answers, sets."""

import random
from collections import Counter
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import pytest

from rain_mergekit.system.shipped_files import TRIO
from rain_mergekit.text.calibration_sets import load_instruction
from testbed.language.constraints import CONSTRAINTS, UNCALIBRATED_CONSTRAINTS, together
from testbed.language.numbers import in_words, numbers
from testbed.language.problems import KINDS, UNCALIBRATED_KINDS
from testbed.language.scoring import numbers as judged
from testbed.language.scoring import score, split
from testbed.language.sets import instruction_record, prompt_record, write_choosing, write_prompts
from testbed.language.tasks import (
    Asked,
    Task,
    calibrated_only,
    draw_task,
    follows,
    is_right,
    split_of,
)
from testbed.models.generation import Output
from testbed.models.loading import load_tokenizer
from testbed.puzzles.records import read_lines, write_lines

every_kind = pytest.mark.parametrize("kind", KINDS)
every_constraint = pytest.mark.parametrize("name", CONSTRAINTS)


def dice(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - nothing secret is drawn


def suiting(name: str, kind: str, seed: int = 0) -> Task | None:
    """A task of the kind with the constraint; None where it asks for numbers and there is none."""
    problem = KINDS[kind](dice(seed))
    if name == "words" and not problem.answer.isdigit():
        return None
    parameter = CONSTRAINTS[name].parameters[0]
    return Task(problem, (Asked(name, parameter, CONSTRAINTS[name].known[0].format(parameter)),))


@every_constraint
@every_kind
def test_the_right_answer_follows_and_the_plain_one_does_not(name: str, kind: str) -> None:
    for seed in range(20):
        task = suiting(name, kind, seed)
        if task is None:
            return
        asked = [(one.name, one.parameter) for one in task.asked]
        assert follows(task.answer(), asked), task.answer()
        assert is_right(task.answer(), task.problem.answer), task.answer()
        assert not follows(task.answer(follow=False), asked), task.answer(follow=False)
        assert is_right(task.answer(follow=False), task.problem.answer)


def test_every_pair_that_goes_together_can_be_followed() -> None:
    pairs = [p for p in combinations(CONSTRAINTS.values(), 2) if together(*p)]
    assert len(pairs) >= 30
    for pair in pairs:
        for kind in KINDS:
            problem = KINDS[kind](dice(3))
            if "words" in {c.name for c in pair} and not problem.answer.isdigit():
                continue
            asked = tuple(Asked(c.name, c.parameters[-1], "") for c in pair)
            answer = Task(problem, asked).answer()
            assert follows(answer, [(a.name, a.parameter) for a in asked]), answer
            assert is_right(answer, problem.answer), answer


def test_constraints_have_known_and_held_out_wordings() -> None:
    assert len(CONSTRAINTS) - len(UNCALIBRATED_CONSTRAINTS) >= 12
    for constraint in CONSTRAINTS.values():
        assert len(set(constraint.known)) >= 4
        assert len(set(constraint.held)) >= 2
        assert not set(constraint.known) & set(constraint.held)
        if constraint.parameters != ("",):
            assert all("{}" in wording for wording in (*constraint.known, *constraint.held))


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("In total, Tom pays 17 coins.", "17", True),
        ("IN TOTAL, TOM PAYS SEVENTEEN COINS.", "17", True),
        ("1. Tom buys pens.\n2. Tom pays 17 coins.", "17", True),
        ("Tom has 17 pens and pays 12 coins.", "17", False),
        ("Tom pays 117 coins.", "17", False),
        ('{"answer": "17"}', "17", True),
        ("Of the three, MIA has the most nuts.", "Mia", True),
        ("Mia has more nuts than Tom.", "Mia", False),
        ("It is **Monday**.", "Monday", True),
        ("It is Sunday.", "Monday", False),
        ("", "17", False),
    ],
)
def test_whether_an_answer_is_right(answer: str, expected: str, right: bool) -> None:
    assert is_right(answer, expected) is right


def test_numbers_in_words_and_back() -> None:
    assert in_words("3 and 40 and 21") == "three and forty and twenty-one"
    assert numbers(in_words(" ".join(map(str, range(100))))) == list(range(100))


@pytest.mark.parametrize(
    ("output", "answer", "whole"),
    [
        ("<think>\nadd\n</think>\n\nFive.", "Five.", True),
        ("Five.", "Five.", False),
        ("<think>\nadd", "", False),
        ("<think>\n\n</think>\n\nFive.", "Five.", False),
        (
            "<think>\na\n</think>\n\n<think>\nb\n</think>\n\nFive.",
            "<think>\nb\n</think>\n\nFive.",
            False,
        ),
        ("So <think>\na\n</think>\n\nFive.", "Five.", False),
        ("a\n</think>\n\nFive.", "Five.", False),
    ],
)
def test_taking_an_output_apart(output: str, answer: str, whole: bool) -> None:
    parts = split(output)
    assert (parts.answer, parts.whole) == (answer, whole)
    if whole:
        assert parts.head + parts.answer == output


def test_each_problem_belongs_to_one_split_and_sets_keep_theirs(tmp_path: Path) -> None:
    write_prompts(0, tmp_path)
    again = tmp_path / "again"
    again.mkdir()
    write_prompts(0, again)
    for name in ("validation", "test"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (again / f"{name}.jsonl").read_bytes()
    test = read_lines(tmp_path / "test.jsonl")
    asked = [record for record in test if record["constraints"]]
    assert (len(test), len(asked)) == (256, 128)
    assert sum(record["held_out_wording"] for record in asked) == 64
    assert 20 <= sum(not record["calibrated"] for record in asked) <= 60
    assert len({record["prompt"] for record in test}) == len(test)
    rng = dice(1)
    for name in ("train", "calibration", "validation", "test"):
        for _ in range(40):
            assert split_of(draw_task(rng, name, 1).problem.question) == name


def test_calibration_tasks_hold_no_uncalibrated_kind_or_constraint() -> None:
    rng = dice(2)
    tasks = [draw_task(rng, "calibration", n % 3, **calibrated_only()) for n in range(300)]
    assert all(task.calibrated for task in tasks)
    assert not {task.problem.kind for task in tasks} & set(UNCALIBRATED_KINDS)
    every = [draw_task(rng, "calibration", 1) for _ in range(300)]
    assert not all(task.calibrated for task in every)


def test_right_texts_score_in_every_way() -> None:
    rng = dice(4)
    records = [prompt_record(draw_task(rng, "test", n % 3, held_out=n % 2 == 0)) for n in range(60)]
    scores = [score(record, record["output"], 9, ended=True) for record in records]
    found = judged(records, scores)["numbers"]
    for name in (
        "plain_right",
        "whole_plain",
        "whole_constrained",
        "followed",
        "both",
        "all_three",
    ):
        assert found[name]["value"] == 1.0
    assert found["loops"]["value"] == 0.0
    bare = [record["output"].partition("</think>\n\n")[2] for record in records]
    direct = [
        score(record, text, 9, ended=True) for record, text in zip(records, bare, strict=True)
    ]
    found = judged(records, direct)["numbers"]
    assert (found["both"]["value"], found["all_three"]["value"]) == (1.0, 0.0)
    plain = [score(record, "No idea.", 3, ended=False) for record in records]
    found = judged(records, plain)["numbers"]
    assert found["whole_plain"]["value"] == found["plain_right"]["value"] == 0.0
    assert (found["loops"]["value"], found["tokens"]["value"]) == (1.0, 3.0)
    assert not any(asdict(one)["both"] for one in plain)


def test_instruction_records_have_spans_that_the_calibration_finds(tmp_path: Path) -> None:
    rng, records = dice(5), []
    for n in range(120):
        task = draw_task(rng, "calibration", 1 + n % 2, **calibrated_only())
        wrong = Output("<think>\nno idea\n</think>\n\nIt is 99.", 9, ended=True)
        own = Output(task.block.replace("\n</", " \n</") + task.answer(follow=False), 9, ended=True)
        records.append(instruction_record(task, wrong if n % 3 else own))
        assert (task.block in records[-1]["output"]) == bool(n % 3)
    write_lines(tmp_path / "instruction.jsonl", records)
    data = load_instruction(tmp_path / "instruction.jsonl", load_tokenizer(TRIO / "reasoning"))
    assert data.skipped == ()
    assert len(data.samples) == len(records)


def test_prompts_for_choosing_are_none_to_judge_on(tmp_path: Path) -> None:
    write_prompts(0, tmp_path)
    chosen = read_lines(write_choosing(0, tmp_path))
    counts = Counter((bool(one["constraints"]), one["held_out_wording"]) for one in chosen)
    assert counts[True, True] == 64
    assert counts[True, False] == 64
    assert len(chosen) == 64 + 64 + 48
    judged_on = {one["prompt"] for one in read_lines(tmp_path / "test.jsonl")}
    assert not judged_on & {one["prompt"] for one in chosen}
