"""Samples as the second turn of a chat: which, behind what, and where their parts are then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import TEMPLATE, make_tokenizer

from rain_mergekit.system.json_samples import JsonObject
from rain_mergekit.text.calibration_sets import load_instruction, load_reasoning, read_reasoning
from rain_mergekit.text.later_turns import LaterTurns, turns_of
from rain_mergekit.text.markers import NO_MARKERS, Markers
from rain_mergekit.text.samples import (
    InstructionSample,
    ReasoningSample,
    parse_instruction,
    parse_reasoning,
)

TURN = ("Is 51 prime?", "No, 51 = 3 x 17.")
HEAD = "<|user|>{}<|end|><|assistant|>"
EARLIER = HEAD.format(TURN[0]) + TURN[1] + "<|end|>"


def write(folder: Path, *samples: object) -> Path:
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


def parsed(**fields: Any) -> Any:
    return json.loads(json.dumps(fields), object_pairs_hook=JsonObject)


def reasoning(**fields: Any) -> ReasoningSample:
    fields = {"prompt": "p", "output": "<think>a</think>b", **fields}
    return parse_reasoning("set:1", parsed(**fields))


def instruction(**fields: Any) -> InstructionSample:
    return parse_instruction("other:1", parsed(output="x", **fields), spans_needed=False)


def turns(**fields: Any) -> list[tuple[str, str]]:
    return turns_of([reasoning(**fields)], Markers(), ["<|end|>", "<|user|>"])


def test_a_turn_is_the_prompt_and_the_answer_without_its_thinking() -> None:
    assert turns(output="<think>\na\n</think>\n\nYes.\n") == [("p", "Yes.")]
    assert turns(output=None, reasoning="a", response="Yes.") == [("p", "Yes.")]
    assert turns(output="a\n</think>\n\nYes.") == [("p", "Yes.")]  # the template opened the block
    assert turns(output="<think>a</think>Yes.<|end|>") == [("p", "Yes.")]
    assert turns(output="<think>a</think>Yes.\n<|end|>\n<|user|>") == [("p", "Yes.")]
    assert turns_of([reasoning(output="Yes.")], NO_MARKERS) == [("p", "Yes.")]


def test_what_has_no_answer_or_is_no_first_turn_goes_before_nothing() -> None:
    assert turns(output="<think>never closed") == []
    assert turns(output="<think>a</think>\n") == []
    assert turns(output=None, reasoning="a") == []
    chat = [{"role": role, "content": "c"} for role in ("user", "assistant", "user")]
    assert turns_of([reasoning(prompt=None, messages=chat)], Markers()) == []
    # what a chat template would take for more than an answer
    assert turns(output="<think>a</think>Yes.<|end|><|user|>And?<|end|>") == []
    assert turns(output=None, reasoning="a", response="It says <think> there.") == []


def test_a_share_of_all_prompts_is_chosen_by_their_text_alone() -> None:
    prompts = [f"What is {number} and one?" for number in range(1000)]
    chosen: dict[float, set[str]] = {}
    for share in (0.25, 0.5, 1.0):
        later = LaterTurns(share, [TURN])
        samples = [later.of(reasoning(prompt=prompt)) for prompt in prompts]
        chosen[share] = {sample.prompt for sample in samples if sample.before}
        assert len(chosen[share]) == pytest.approx(1000 * share, abs=45)  # three deviations
        for prompt in prompts[:50]:
            other = later.of(instruction(prompt=prompt))
            assert bool(other.before) == (prompt in chosen[share])
    assert chosen[0.25] < chosen[0.5] < chosen[1.0] == set(prompts)


def test_a_prompt_never_goes_before_itself_and_all_turns_come() -> None:
    prompts = [f"What is {number} and one?" for number in range(60)]
    later = LaterTurns(1.0, [(prompt, "So much.") for prompt in prompts])
    before = {prompt: later.of(reasoning(prompt=prompt)).before[0]["content"] for prompt in prompts}
    assert all(prompt != other for prompt, other in before.items())
    assert len(set(before.values())) > 30
    alone = LaterTurns(1.0, [("p", "b")])
    assert alone.of(reasoning()).before == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": role, "content": "c"} for role in ("user", "assistant", "user")]},
        {"messages": [{"role": "user", "content": "c"}, {"role": "tool", "content": "d"}]},
        {"messages": [{"role": "user", "content": "c"}], "tools": [{"name": "clock"}]},
    ],
)
def test_a_conversation_of_its_own_stays_as_it_is(fields: dict[str, Any]) -> None:
    sample = reasoning(**{"prompt": None, **fields})
    assert LaterTurns(1.0, [TURN]).of(sample) is sample


def test_the_turn_stands_behind_the_system_message(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    path = write(tmp_path, {"messages": messages, "output": "<think>\nA\n</think>\n\nHello."})
    tokenizer = make_tokenizer(TEMPLATE)
    (tokens,) = load_reasoning(path, tokenizer, later=LaterTurns(1.0, [TURN])).samples
    text = tokenizer.decode(tokens.input_ids)
    assert text.startswith("<|system|>Be brief.<|end|>" + EARLIER + HEAD.format("Hello?"))
    lent = [tokens.input_ids[place] for place in tokens.lent_positions]
    # up to where the sample's own question begins
    assert tokenizer.decode(lent) == EARLIER.removeprefix("<|user|>") + "<|user|>"


def test_the_same_question_in_both_turns_is_told_apart(tmp_path: Path) -> None:
    """Spans are looked for in the sample's own question, and positions are those of messages."""
    spec = {"prompt_spans": ["in capitals"], "response_spans": ["HELLO"]}
    sample = {"prompt": "Say hello, in capitals.", "output": "<think>a</think>HELLO"}
    path = write(tmp_path, {**sample, "related_prompt_list": [spec]})
    tokenizer = make_tokenizer(TEMPLATE)
    before = ("Say moon, in capitals.", "HELLO MOON")
    (tokens,) = load_instruction(path, tokenizer, later=LaterTurns(1.0, [before])).samples
    (alone,) = load_instruction(path, tokenizer).samples
    shift = len(tokens.input_ids) - len(alone.input_ids)
    assert shift > 0
    assert tokens.spans[0].prompt == tuple(place + shift for place in alone.spans[0].prompt)
    assert tokens.spans[0].related == tuple(place + shift for place in alone.spans[0].related)
    assert tokens.answer_start == alone.answer_start + shift
    assert tokens.think_positions == tuple(place + shift for place in alone.think_positions)


def test_a_turn_that_the_template_refuses_ends_nothing(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(
        "{% for m in messages if '!' in m.content %}{{ raise_exception('no !') }}{% endfor %}"
        + TEMPLATE
    )
    path = write(tmp_path, {"prompt": "Hello?", "output": "<think>a</think>Hello."})
    data = load_reasoning(path, tokenizer, later=LaterTurns(1.0, [("Hi!", "Yes.")]))
    assert (len(data.samples), data.later) == (1, 0)
    [(_, reason)] = data.alone
    assert "refuses this sample: no !" in reason


def test_messages_of_a_developer_alone_are_no_first_turn(tmp_path: Path) -> None:
    messages = [{"role": "developer", "content": "Say hello."}]
    path = write(tmp_path, {"messages": messages, "output": "<think>a</think>Hello."})
    data = load_reasoning(path, make_tokenizer(TEMPLATE), later=LaterTurns(1.0, [TURN]))
    assert (len(data.samples), data.later) == (1, 0)


def test_what_gets_too_long_stays_a_first_turn(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "Hello?", "output": "<think>a</think>Hello."})
    tokenizer = make_tokenizer(TEMPLATE)
    size = len(load_reasoning(path, tokenizer).samples[0].input_ids)
    data = load_reasoning(path, tokenizer, max_tokens=size, later=LaterTurns(1.0, [TURN]))
    assert len(data.samples[0].input_ids) == size
    assert data.later == 0
    [(source, reason)] = data.alone
    assert source.endswith(":1")
    assert "more than max_tokens" in reason
    assert data.skipped == ()
    long = load_reasoning(path, tokenizer, max_tokens=size + 99, later=LaterTurns(1.0, [TURN]))
    assert (long.later, long.alone) == (1, ())
    assert [one.before for one in read_reasoning(path)] == [()]
