"""The testbed's agent: prompts and calls by hand, scores of outputs, rows, and the page."""

from __future__ import annotations

import json
import random
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from doc_blocks import ROOT
from mergekit.config import MergeConfiguration

from testbed.agent import board, making, page, tools, training
from testbed.agent.scoring import score
from testbed.models.loading import load_model, load_tokenizer
from testbed.models.training import Run, encode_pairs
from testbed.puzzles.counting import FAMILY, NUMBERS, THINGS
from testbed.puzzles.family import Mixture, Stage
from testbed.puzzles.samples import draw_problem
from testbed.puzzles.splits import split_of

TRIO = ROOT / "testbed" / "trios" / "qwen-s0"
ALL = (*tools.TOOLS, *tools.HELD)
RECORD = {
    "prompt": "two keys . a +2 . b x3 . c -1 . how many keys ? write it .",
    "tool": "note",
    "arguments": {"count": 1, "thing": "keys"},
    "number": 1,
    "plain": "answer : one keys",
    "thinking": "a two +2 is four . b four x3 is two . c two -1 is one .",
    "key": "two a +2 . b x3 . c -1 .",
}
THOUGHT = f"<think>\n{RECORD['thinking']}</think>\n\n"
CALL = '<tool_call>{"name": "note", "arguments": {"count": 1, "thing": "keys"}}</tool_call>'


@pytest.fixture(name="found")
def _found() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / board.RESULTS).read_text(encoding="utf-8"))
    return found


def dice(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - nothing secret is drawn


def marks(output: str, record: dict[str, Any] | None = None) -> set[str]:
    found = score(record or RECORD, output, frozenset(THINGS))
    return {name for name, value in asdict(found).items() if value}


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (CALL, {"form", "number", "both", "at_once"}),
        (THOUGHT + CALL, {"thought", "thought_right", "form", "number", "both"}),
        (
            THOUGHT.replace("four x3 is two", "four x3 is nine") + CALL,
            {"thought", "form", "number", "both"},
        ),
        (THOUGHT + CALL.replace("1", "7"), {"thought", "thought_right", "form"}),
        (THOUGHT + CALL.replace("keys", "cups"), {"thought", "thought_right", "form", "number"}),
        (THOUGHT + CALL.replace("note", "send"), {"thought", "thought_right", "number"}),
        (THOUGHT + CALL.replace("count", "number"), {"thought", "thought_right", "number"}),
        (THOUGHT + CALL.replace("1", '"one"'), {"thought", "thought_right"}),
        (THOUGHT + CALL.replace("}}", "}"), {"thought", "thought_right"}),
        (THOUGHT + CALL.removesuffix("</tool_call>"), {"thought", "thought_right"}),
        (THOUGHT + CALL + CALL, {"thought", "thought_right"}),
        (THOUGHT + "answer : one keys", {"thought", "thought_right", "number"}),
        ("answer : four keys", set()),
        (THOUGHT.replace("</think>", "") + CALL, set()),
        ("<tool_call>[1]</tool_call>", set()),
        ("", set()),
    ],
)
def test_an_output_is_scored(output: str, expected: set[str]) -> None:
    assert marks(output) == expected


def test_a_thing_may_be_the_name_of_an_argument() -> None:
    record = {**RECORD, "tool": "store", "arguments": {"what": {"keys": 1}}}
    right = '<tool_call>{"name": "store", "arguments": {"what": {"keys": 1}}}</tool_call>'
    assert marks(right, record) == {"form", "number", "both", "at_once"}
    assert marks(right.replace("keys", "cups"), record) == {"form", "number"}
    assert marks(right.replace("keys", "count"), record) == {"number"}


def test_each_tool_writes_its_own_arguments() -> None:
    made = {tool.name: tool.arguments(1, "keys") for tool in ALL}
    assert made == {
        "note": {"count": 1, "thing": "keys"},
        "speak": {"words": [1, "keys"]},
        "send": {"item": "keys", "number": 1},
        "store": {"what": {"keys": 1}},
        "close": {"last": 1, "of": "keys"},
        "echo": {"text": "keys", "times": 1},
    }
    assert tools.call_text("note", made["note"]) == CALL


def test_phrases_are_made_of_words_that_every_model_knows() -> None:
    tokenizer = load_tokenizer(TRIO / "pretrained")
    phrases = [phrase for tool in ALL for phrase in tool.phrases]
    assert len(set(phrases)) == len(phrases)
    for phrase in phrases:
        assert len(tokenizer.tokenize(" " + phrase)) == len(phrase.split()), phrase


def test_a_prompt_does_not_show_the_call() -> None:
    rng = dice(1)
    for tool in ALL:
        problem = draw_problem(FAMILY, rng, 0, "test", 3)
        prompt = tools.asked(problem, tool, rng)
        assert any(phrase in prompt for phrase in tool.phrases)
        assert problem.text in prompt
        assert tool.name not in prompt.split()


@pytest.mark.parametrize("split", ["calibration", "validation", "test"])
def test_chains_are_distinct_and_of_their_split(split: str) -> None:
    made = tools.chains(FAMILY, dice(2), 0, split, ALL, 4)
    keys = [record["key"] for record in made]
    assert len(set(keys)) == len(ALL) * 4
    assert {split_of(key, 0) for key in keys} == {split}
    assert [record["tool"] for record in made] == [tool.name for tool in ALL for _ in range(4)]


def test_the_agent_is_trained_on_no_other_chain() -> None:
    mixture, rng = Mixture(1.0, 0.0, 0.5, 1.0, 0.0), dice(3)
    said = set()
    for _ in range(200):
        prompt, given, reply = tools.agent_draw(FAMILY, mixture, rng, 0)
        assert not given
        words = prompt.split()
        start = next(i for i, word in enumerate(words) if word == "a")
        stop = max(i for i, word in enumerate(words) if word[0] in "+-x" and len(word) == 2)
        key = " ".join([words[start - 3], *words[start : stop + 2]])
        assert split_of(key, 0) == "train", prompt
        said.add(reply.split('"')[3] if reply.startswith("<tool_call>") else "plain")
    assert said == {"plain", *(tool.name for tool in ALL)}


def test_thinking_that_stands_in_the_reply_is_not_learnt() -> None:
    mixture, rng = Mixture(1.0, 1.0, 1.0, 1.0, 0.0), dice(6)
    tokenizer = load_tokenizer(TRIO / "pretrained")
    run = Run(FAMILY, Stage(mixture, 1, 0.0), tokenizer, rng, 0, tools.agent_draw)
    for ids, start in encode_pairs(run, 20):
        text, learnt = tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])
        assert text.endswith(" .</think>\n\n")
        assert learnt.startswith("<tool_call>{")
        assert learnt.endswith("}</tool_call><|im_end|>")
        thinking = text.partition("<think>\n")[2]
        number = NUMBERS.index(thinking.split()[-2])
        assert str(number) in learnt


def test_what_calls_are_made_of_are_tokens_of_their_own() -> None:
    tokenizer = training.agent_tokenizer()
    words = {*THINGS, *(tool.name for tool in ALL)}
    for tool in ALL:
        words |= set(re.findall("[a-z]+", json.dumps(tool.arguments(1, "keys"))))
    for word in sorted(words | {"name", "arguments", "assistant", "user", "answer"}):
        assert tokenizer.tokenize(f'"{word}"') == ['"', word, '"']
    assert tokenizer.tokenize(CALL)[0] == "<tool_call>"
    assert tokenizer.tokenize(CALL)[-1] == "</tool_call>"
    assert tokenizer.decode(tokenizer.encode(THOUGHT + CALL)) == THOUGHT + CALL


def test_the_longer_vocabulary_changes_nothing_that_was_said() -> None:
    tokenizer = training.agent_tokenizer()
    old, before = load_model(training.ORIGIN), load_tokenizer(training.ORIGIN)
    made = training.extended(tokenizer)
    text = "<|im_start|>user\n two keys . a +2 .<|im_end|>\n<|im_start|>assistant\n<think>\na two"
    names = tokenizer.convert_ids_to_tokens(tokenizer.encode(text))
    assert names == before.convert_ids_to_tokens(before.encode(text))
    here, there = tokenizer.get_vocab(), before.get_vocab()
    shared = sorted(set(here) & set(there))
    assert len(shared) == len(there) < len(here)
    with torch.inference_mode():
        now = made(torch.tensor([tokenizer.encode(text)])).logits[..., [here[s] for s in shared]]
        then = old(torch.tensor([before.encode(text)])).logits[..., [there[s] for s in shared]]
    torch.testing.assert_close(now, then)


def test_the_parent_sees_thinking_and_calls_but_never_both() -> None:
    mixture, rng = FAMILY.stages["pretrained"].mixture, dice(7)
    kinds, tools_of = set(), dict[str, set[str]]()
    for _ in range(600):
        prompt, given, reply = tools.parent_draw(FAMILY, mixture, rng, 0)
        assert not given
        kinds.add(("<think>" in reply, "<tool_call>" in reply))
        for tool in ALL if "<tool_call>" in reply else ():
            if prompt.endswith(tool.phrases[0]):
                tools_of.setdefault(tool.name, set()).add(json.loads(reply[11:-12])["name"])
    assert kinds == {(True, False), (False, True), (False, False)}
    assert all(len(names) > 1 for names in tools_of.values())


def test_tuning_leaves_what_the_head_reads_as_the_parent_has_it(tmp_path: Path) -> None:
    training.train(tmp_path, scale=0.001)
    parent = load_model(tmp_path / "parent").state_dict()
    for name in ("donor", "agent"):
        made = load_model(tmp_path / name).state_dict()
        same = {key for key, value in made.items() if torch.equal(value, parent[key])}
        outside = {key for key in made if ".layers." not in key}
        assert outside <= same
        assert "model.layers.0.mlp.up_proj.weight" not in same


def test_look_ups_to_judge_on_are_not_those_that_stay() -> None:
    rng = dice(4)
    used = frozenset(record["prompt"] for record in making.look_ups_that_stay())
    made = tools.look_ups(FAMILY, rng, ALL, 20, used)
    assert len({record["prompt"] for record in made}) == len(ALL) * 20
    assert not used & {record["prompt"] for record in made}
    assert all(" " not in record["key"] for record in made)


def test_what_comes_begins_with_the_donors_thinking() -> None:
    made = tools.chains(FAMILY, dice(5), 0, "calibration", tools.TOOLS, 3)
    heads, calls = making.continued(TRIO / "reasoning", TRIO / "instruct", made)
    right = [
        head == f"<think>\n{one['thinking']}</think>\n\n"
        for one, head in zip(made, heads, strict=True)
    ]
    assert sum(right) >= 10
    assert all(call.startswith("answer :") for call in calls)  # a model that knows no tools
    assert making.thought("<think>\na two") == ""
    assert making.thought(CALL) == ""


def test_kinds_of_prompts_are_judged_apart() -> None:
    records = [
        RECORD,
        {**RECORD, "tool": "close", "arguments": {"last": 1, "of": "keys"}},
        {**RECORD, "key": "one"},
        {**RECORD, "key": "one"},
    ]
    found = board.judged(records, [THOUGHT + CALL, CALL, CALL, ""])
    shares = {name: one["value"] for name, one in found.items() if name.endswith("/both")}
    assert shares == {"chains/both": 1.0, "held/both": 0.0, "look-ups/both": 0.5}
    assert found["chains/thought"]["value"] == 1.0
    assert found["look-ups/at_once"]["value"] == 0.5


def test_every_recipe_is_one_that_mergekit_knows() -> None:
    for row in board.ROWS:
        for strength in row.strengths:
            config = MergeConfiguration.model_validate(row.recipe(TRIO, strength))
            assert str(TRIO / "agent") in {str(m.model) for m in config.referenced_models()}


def test_the_page_says_what_the_results_say(found: dict[str, Any]) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.written(text, found) == text
    (row,) = [r for r in found["rows"] if (r["name"], r["begins"]) == ("rain, streams", "")]
    low, high = row["numbers"]["chains/both"]["interval"]
    assert low <= row["numbers"]["chains/both"]["value"] <= high
    assert f"| rain, streams | {100 * row['numbers']['chains/thought']['value']:.0f} |" in text


def test_strengths_are_the_best_on_validation_prompts(found: dict[str, Any]) -> None:
    swept = [row for row in found["rows"] if row.get("swept")]
    assert "task_arithmetic" in {row["name"] for row in swept}
    for row in swept:
        shares = {float(s): one["chains/both"] for s, one in row["swept"].items()}
        assert shares[row["strength"]] == max(shares.values())
