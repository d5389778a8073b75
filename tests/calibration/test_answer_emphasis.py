"""Which answer tokens count most: the cases beside the dense reference of test_streams_exact."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from stored_changes import products
from tiny import INSTRUCTION, Tiny
from torch import Tensor

from rain_mergekit.calibration import answer_emphasis
from rain_mergekit.calibration.token_teachers import GROUPS, TaughtText, token_weights, weights_of

TOTALS = {"prompts": 0.5, "markers": 1.0, "thinking": 1.0, "answers": 1.0, "responses": 0.5}


def differ(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    assert one.keys() == two.keys()
    return any(not torch.equal(one[name], two[name]) for name in one)


def swap_numbers(tiny: Tiny) -> None:
    """In the instruct model's tokenizer two tokens of an answer change their numbers."""
    tokenizer = tiny.tokenizer()
    text = INSTRUCTION[0]["response"]
    first, second = list(dict.fromkeys(tokenizer.tokenize(text)))[:2]
    path = tiny.folder / "instruct" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))


def test_even_weighs_all_answer_tokens_alike(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "llama").using(fit="streams")
    tiny.calibrate()
    weighed = products(tiny.path)
    even = tiny.using("even.rain.safetensors", fit="streams", stream_emphasis="even")
    even.calibrate()
    assert differ(weighed, products(even.path))


def test_tokens_with_two_numbers_cannot_be_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = Tiny.make(tmp_path, "llama").using(fit="streams", accept=["no_thinking"])
    tiny.tokenizer().save_pretrained(tmp_path / "instruct")
    swap_numbers(tiny)
    with caplog.at_level(logging.WARNING, logger=answer_emphasis.__name__):
        tiny.calibrate()
    assert "all answer tokens weigh alike" in caplog.text
    even = tiny.using(
        "even.rain.safetensors",
        fit="streams",
        stream_emphasis="even",
        accept=["no_thinking"],
    )
    even.calibrate()
    assert not differ(products(tiny.path), products(even.path))


def test_a_group_weighs_what_it_should_however_its_tokens_share_that() -> None:
    answers, prompts, thinking = (GROUPS.index(one) for one in ("answers", "prompts", "thinking"))
    texts = [
        TaughtText("a", (1, 2, 3, 4), (prompts, answers, answers, answers), False, (0.5, 2.0, 1.0)),
        TaughtText("b", (1, 2, 3), (prompts, answers, thinking), False, (4.0, 9.0)),
        TaughtText("c", (1, 2), (prompts, answers), True, (3.0,)),
    ]
    fitted = token_weights(texts, TOTALS)
    weights = [weights_of(text, fitted) for text in texts]
    # the second text's last token is none of the instruct model's
    expected = [0.25, 0.5 / 7.5, 2 / 7.5, 1 / 7.5, 0.25, 4 / 7.5, 1.0]
    assert torch.cat(weights[:2]).tolist() == pytest.approx(expected, rel=1e-12)
    aside = weights_of(texts[2], token_weights(texts, TOTALS, held_out=True))
    assert aside.tolist() == pytest.approx([0.5, 1.0], rel=1e-12)
