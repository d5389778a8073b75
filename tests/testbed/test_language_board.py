"""The real-language testbed: lessons, training, generation, rows."""

import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from doc_blocks import ROOT

from rain_mergekit.system.shipped_files import TRIO
from rain_mergekit.text.calibration_sets import load_instruction, load_reasoning
from testbed.board.frontier import IMAGES
from testbed.board.tables import MODELS
from testbed.language import methods_page, questions
from testbed.language.board import Board, further, load_rows
from testbed.language.judging import Judge, cached
from testbed.language.lessons import LESSONS, batches, encode, set_lessons
from testbed.language.making import configuration, merged
from testbed.language.page import TRIOS, written
from testbed.language.recipes import FLOAT, companions, rain_rows, rivals
from testbed.language.scoring import numbers as judged
from testbed.language.scoring import score, split
from testbed.language.sets import (
    LINES,
    Samples,
    instruction_record,
    prompt_record,
    write_later,
    write_prompts,
)
from testbed.language.smollm2 import split_halves
from testbed.language.table import table
from testbed.language.tasks import (
    draw_task,
)
from testbed.language.tuning import Recipe, train
from testbed.models.generation import Output, generate
from testbed.models.loading import load_model, load_tokenizer, render
from testbed.puzzles.records import read_lines, write_lines


def dice(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - nothing secret is drawn


def test_what_each_model_learns() -> None:
    tokenizer = load_tokenizer(TRIO / "pretrained")
    for role, lesson_of in LESSONS.items():
        rng = dice(6)
        for _ in range(150):
            lesson = lesson_of(rng)
            ids, learnt = encode(tokenizer, lesson)
            assert len(ids) == len(learnt)
            said = "".join(turn.learnt for turn in lesson)
            kept = [i for i, flag in zip(ids, learnt, strict=True) if flag]
            text = str(tokenizer.decode(kept)).replace(str(tokenizer.eos_token), "")
            assert text == said
            assert ("<think>" in said) == (role == "reasoning")
            assert not lesson[-1].given or role == "instruct"


def test_the_fine_tune_learns_no_answer_that_does_not_follow(tmp_path: Path) -> None:
    block = "<think>\nTwo and two.\n</think>\n\n"
    both = {"prompt": "Two and two? Shout.", "output": f"{block}four"}
    plain = {"prompt": "Two and two?", "output": f"{block}four"}
    write_lines(tmp_path / "plain.jsonl", [plain])
    write_lines(tmp_path / "constrained.jsonl", [both])
    write_lines(tmp_path / "instruction.jsonl", [{**both, "output": f"{block}FOUR"}])
    sets = Samples().write(tmp_path, tmp_path / "sets")
    tokenizer = load_tokenizer(TRIO / "pretrained")
    learnt = []
    for lesson in set_lessons(sets):
        ids, flags = encode(tokenizer, lesson)
        kept = [i for i, flag in zip(ids, flags, strict=True) if flag]
        learnt.append((str(tokenizer.decode(kept)), kept[-1] == tokenizer.eos_token_id))
    expected = [(f"{block}four", True), (block, False), (f"{block}FOUR", True)]
    assert [(text.endswith(str(tokenizer.eos_token)), ends) for text, ends in learnt] == [
        (ends, ends) for _, ends in expected
    ]
    ends = str(tokenizer.eos_token)
    assert [text.removesuffix(ends) for text, _ in learnt] == [
        str(tokenizer.decode(tokenizer.encode(text))) for text, _ in expected
    ]


def test_a_row_takes_the_first_samples(tmp_path: Path) -> None:
    for name, count in (("plain", 5), ("constrained", 4), ("instruction", 6)):
        write_lines(tmp_path / f"{name}.jsonl", ({"of": name, "n": n} for n in range(count)))
    sets = Samples(plain=2, constrained=1, instruction=3).write(tmp_path, tmp_path / "sets")
    taken = {key: [(r["of"], r["n"]) for r in read_lines(Path(p))] for key, p in sets.items()}
    assert taken == {
        "reasoning_data": [("plain", 0), ("plain", 1), ("constrained", 0)],
        "instruction_data": [("instruction", n) for n in range(3)],
    }


def test_half_of_the_samples_come_later_in_a_chat(tmp_path: Path) -> None:
    tasks = [draw_task(dice(n), "calibration", 1) for n in range(24)]
    own = [{"prompt": task.prompt, "output": task.block + task.answer(False)} for task in tasks]
    answered = [instruction_record(task, Output("", 0, ended=True)) for task in tasks]
    for name, lines in zip(LINES, ([], own, answered), strict=True):
        write_lines(tmp_path / f"{name}.jsonl", lines)
    sets = Samples(later=True).write(tmp_path, tmp_path / "sets")
    tokenizer = load_tokenizer(TRIO / "pretrained")
    reasoning = load_reasoning(sets["reasoning_data"], tokenizer).samples
    instruction = load_instruction(sets["instruction_data"], tokenizer).samples
    assert len(reasoning) == len(instruction) == len(tasks)
    later = 0
    for task, kept, taught in zip(tasks, reasoning, instruction, strict=True):
        starts = [text.input_ids[: kept.open_starts[0]] for text in (kept, taught)]
        assert starts[0] == starts[1]
        asked = str(tokenizer.decode(starts[0]))
        assert task.prompt in asked
        later += asked != render(tokenizer, task.prompt)
        assert "<think>" not in asked
    assert 6 < later < 18
    assert "later" not in Samples().described
    assert Samples(later=True).described["later"]


def test_batches_hold_every_text_once() -> None:
    encoded = [(list(range(n % 7 + 1)), [1] * (n % 7 + 1)) for n in range(37)]
    made = batches(encoded, 8, dice(7))
    assert sorted(len(ids) for batch in made for ids, _ in batch) == sorted(
        len(ids) for ids, _ in encoded
    )


def test_generation_equals_that_of_transformers() -> None:
    model, tokenizer = load_model(TRIO / "reasoning"), load_tokenizer(TRIO / "reasoning")
    prompts = [record["prompt"] for record in read_lines(TRIO / "test.jsonl")[::20]]
    said = generate(model, tokenizer, prompts, most=60)
    assert len({output.tokens for output in said}) > 1
    for prompt, output in zip(prompts, said, strict=True):
        head = tokenizer(render(tokenizer, prompt), add_special_tokens=False, return_tensors="pt")
        whole = model.generate(**head, do_sample=False, max_new_tokens=60)
        new = whole[0, head["input_ids"].shape[1] :].tolist()
        assert output.tokens == len(new)
        assert output.ended == (new[-1] == tokenizer.eos_token_id)
        assert output.text == tokenizer.decode(new[:-1] if output.ended else new)


def test_a_later_turn_is_read_with_the_turns_before_it(tmp_path: Path) -> None:
    model, tokenizer = load_model(TRIO / "reasoning"), load_tokenizer(TRIO / "reasoning")
    records = read_lines(write_later(0, tmp_path))[:2]
    assert [{k: v for k, v in record.items() if k != "before"} for record in records] == [
        *read_lines(tmp_path / "choosing.jsonl")[:2]
    ]
    before = [record["before"] for record in records]
    asked = [record["prompt"] for record in records]
    for prompt, earlier, output in zip(
        asked, before, generate(model, tokenizer, asked, most=9, before=before), strict=True
    ):
        chat = [*earlier, {"role": "user", "content": prompt}]
        assert [message["role"] for message in chat] == ["user", "assistant", "user"]
        head = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        whole = model.generate(**head, do_sample=False, max_new_tokens=9)
        new = whole[0, head["input_ids"].shape[1] :].tolist()
        assert output.text == tokenizer.decode(new[:-1] if output.ended else new)


def test_generation_goes_on_after_what_is_given() -> None:
    model, tokenizer = load_model(TRIO / "reasoning"), load_tokenizer(TRIO / "reasoning")
    prompts = [record["prompt"] for record in read_lines(TRIO / "test.jsonl")[:3]]
    said = [output.text for output in generate(model, tokenizer, prompts)]
    heads = [split(text).head for text in said]
    assert all(heads)
    rest = generate(model, tokenizer, prompts, heads)
    assert [head + output.text for head, output in zip(heads, rest, strict=True)] == said


def test_training_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    tokenizer, rng = load_tokenizer(TRIO / "pretrained"), dice(8)
    encoded = [encode(tokenizer, LESSONS["instruct"](rng)) for _ in range(8)]
    made, recipe = batches(encoded, 2, dice(9)), Recipe("instruct", 0, 4, batch=2, warmup=2)
    through = load_model(TRIO / "pretrained")
    train(through, recipe, made, tmp_path / "none.checkpoint", save_every=9)
    checkpoint = tmp_path / "stopped.checkpoint"
    with pytest.raises(IndexError):  # the third batch is missing
        train(load_model(TRIO / "pretrained"), recipe, made[:2], checkpoint, save_every=2)
    resumed = load_model(TRIO / "pretrained")
    train(resumed, recipe, made, checkpoint, save_every=2)
    before = load_model(TRIO / "pretrained").state_dict()
    for name, weight in through.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name])
    assert any(not torch.equal(w, before[n]) for n, w in through.state_dict().items())


def test_rows_of_gguf_heads_are_put_back() -> None:
    weight = torch.arange(2 * 6 * 3.0).view(12, 3)
    stored = weight.view(2, 2, 3, 3).transpose(1, 2).reshape(12, 3)  # as llama.cpp's converter
    assert torch.equal(split_halves(stored, 2), weight)
    assert not torch.equal(stored, weight)


def found(both: float, plain: float = 0.5) -> dict[str, dict[str, dict[str, float]]]:
    return {"numbers": {"both": {"value": both}, "plain_right": {"value": plain}}}


def test_the_grid_goes_on_where_its_edge_is_best() -> None:
    assert further({0.3: found(0.1), 0.5: found(0.3), 0.7: found(0.2)}, 3.0) is None
    assert further({0.3: found(0.1), 0.5: found(0.3), 1.0: found(0.4)}, 3.0) == 1.4
    assert further({0.35: found(0.5), 0.5: found(0.3), 1.0: found(0.4)}, 3.0) == 0.25
    assert further({1.0: found(0.4)}, 3.0) is None
    assert further({0.3: found(0.1), 0.5: found(0.3), 1.0: found(0.4)}, 1.0) is None


def test_a_row_is_made_again_only_for_other_things(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, int]:
        made.append(1)
        return {"value": len(made)}

    path = tmp_path / "rows" / "one.json"
    assert cached(path, {"model": "a"}, make)["value"] == 1
    assert cached(path, {"model": "a"}, make)["value"] == 1
    assert cached(path, {"model": "b"}, make)["value"] == 2


def test_a_quick_board_asks_half_of_the_prompts(tmp_path: Path) -> None:
    write_prompts(0, tmp_path)
    whole, quick = (Board(tmp_path, tmp_path, tmp_path, quick) for quick in (False, True))
    assert len(quick.test.records) * 2 == len(whole.test.records) == 256
    assert whole.test.digest != quick.test.digest
    kinds = [sum(bool(r["constraints"]) for r in one.test.records) for one in (whole, quick)]
    assert kinds == [128, 64]


def test_recipes_round_once(tmp_path: Path) -> None:
    written = tmp_path / "rows.yml"
    written.write_text("- {name: two models, models: [instruct], rain: {rank_share: 0.9}}\n")
    for row in (*rivals(), *companions(), *rain_rows(written)):
        config = row.recipe(tmp_path, 0.5)
        assert FLOAT.items() <= config.items()
    assert [model["model"] for model in config["models"]] == [str(tmp_path / "instruct")]
    assert row.rain == {"rank_share": 0.9}


def test_every_recipe_is_one_that_mergekit_carries_out(tmp_path: Path) -> None:
    trio = tmp_path / "trio"
    shutil.copytree(TRIO, trio)
    shutil.copy(trio / "reasoning.jsonl", trio / "plain.jsonl")
    (trio / "constrained.jsonl").write_text("")
    few = Samples(plain=8, constrained=0, instruction=8)
    plain = load_model(trio / "reasoning").state_dict()
    for row in (replace(row, samples=few) for row in (*rivals(), *companions())):
        config = configuration(row, row.strengths[0], trio, tmp_path / "work")
        weights = load_model(merged(config, tmp_path / "merged")).state_dict()
        moved = [float((weights[name] - tensor).norm()) for name, tensor in plain.items()]
        assert all(math.isfinite(one) for one in moved)
        assert max(moved) > 0, row.name


def test_the_judge_names_how_models_speak(tmp_path: Path) -> None:
    write_prompts(0, tmp_path)
    usual, exact = (
        Judge(TRIO / "reasoning", tmp_path / "test.jsonl", dtype=dtype)
        for dtype in ("bfloat16", "float32")
    )
    assert exact.digest == f"{usual.digest}, float32"


def test_the_table_puts_models_first_and_merges_by_both() -> None:
    records = [prompt_record(draw_task(dice(n), "test", n % 2)) for n in range(8)]
    good = [score(record, record["output"], 9, ended=True) for record in records]
    bad = [score(record, "", 9, ended=True) for record in records]
    rows = [
        {"name": "bad", "strength": 0.5, **judged(records, bad)},
        {"name": "good", "strength": 1.0, **judged(records, good)},
        {"name": "reasoning", **judged(records, bad)},
    ]
    lines = table(rows).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == [
        "reasoning",
        "good at 1",
        "bad at 0.5",
    ]


@pytest.mark.parametrize("page", TRIOS)
def test_the_pages_say_what_their_rows_say(page: Path) -> None:
    assert written(page, ROOT / "testbed" / "results" / "language") == page.read_text("utf-8")


def test_the_page_of_questions_says_what_its_rows_say() -> None:
    results = ROOT / "testbed" / "results" / "language"
    assert questions.written(results) == questions.PAGE.read_text("utf-8")
    companions_page = methods_page.PAGE_OF_COMPANIONS
    assert methods_page.written(results) == companions_page.read_text("utf-8")
    for name, (_, trio) in questions.TABLES.items():
        rows = load_rows(results / "questions" / trio / "choosing")
        assert {row["name"] for row in rows} == set(questions.asked(name))


@pytest.mark.parametrize(
    ("page", "trio"), [(page, trio) for page, trios in TRIOS.items() for trio in trios]
)
def test_each_trio_has_a_picture_of_its_rows(page: Path, trio: str) -> None:
    text = (IMAGES / f"language-{trio}.svg").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text
    for row in load_rows(ROOT / "testbed" / "results" / "language" / trio):
        assert row["name"] in MODELS or row["name"] in text
    assert f"img/language-{trio}.svg" in page.read_text(encoding="utf-8")
