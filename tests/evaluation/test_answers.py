"""What `ask` and `compare` say of answers that are broken on purpose, each in one way."""

from __future__ import annotations

import inspect
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import TRIO, refused, run, succeed
from safetensors.torch import load_file, save_file
from scipy.stats import bootstrap
from scripted_server import CUT, Reply, serving

from rain_mergekit.data_building.tasks import Written
from rain_mergekit.errors import RainError
from rain_mergekit.evaluation.answer_files import own_prompts, read_answers
from rain_mergekit.evaluation.answer_measures import faults, measure, reading_of
from rain_mergekit.evaluation.comparison import METRICS, difference, interval
from rain_mergekit.instructions.answer_key import AnswerKey, read_key
from rain_mergekit.instructions.prompts import Asked, Instruction
from rain_mergekit.system.json_fields import JsonFields
from rain_mergekit.system.json_samples import JsonObject
from rain_mergekit.text.markers import Markers
from testbed import own_prompts as generator

# scipy 1.15 renamed the argument
SEED = "rng" if "rng" in inspect.signature(bootstrap).parameters else "random_state"
CHINESE = "\u56e0\u4e3a\u8fd9\u662f\u7b54\u6848"
GOOD = "<think>\nTwo and two make four.\n</think>\n\nThe answer is 4."
LOOP = "<think>\nTwo." + " Wait, let me check that again." * 20
ASKED = Asked("p:1", "What is 2 + 2? Say it without a comma.", (), AnswerKey(("4",)))
BROKEN: dict[str, tuple[Reply, list[str]]] = {
    "good": (GOOD, []),
    "taken apart": (("Two and two.", "The answer is 4."), []),
    "no block": ("The answer is 4.", ["no thinking block"]),
    "unclosed": ("<think>\nIt is 4.", ["block never closed", "wrong answer"]),
    "unclosed, taken apart": (("It is 4.", ""), ["block never closed", "wrong answer"]),
    "cut": (f"<think>\nIt is 4.{CUT}", ["cut off while thinking", "wrong answer"]),
    "cut answer": (f"{GOOD[:-2]}{CUT}", ["answer cut off", "wrong answer"]),
    "empty": ("<think>\n</think>\n\nIt is 4.", ["empty block"]),
    "twice": (f"{GOOD}\n<think>\nAgain.\n</think>\n\nIt is 4.", ["several blocks"]),
    "opened again": (
        f"{GOOD}\n<think>\nAgain: 4",
        ["block never closed", "several blocks", "wrong answer"],
    ),
    "no response": ("<think>\nIt is 4.\n</think>\n", ["no response", "wrong answer"]),
    "loop": (LOOP + CUT, ["cut off while thinking", "loop", "wrong answer"]),
    "loop that ends": (f"{LOOP}\n</think>\n\nIt is 4.", ["loop"]),
    "counting up": (
        f"<think>\n{' '.join(f'Step {i} is like the step before it.' for i in range(40))}{CUT}",
        ["cut off while thinking", "loop", "wrong answer"],
    ),
    "language": (f"<think>\n{CHINESE}\n</think>\n\nIt is 4.", ["other language"]),
    "wrong": (GOOD.replace("is 4", "is 5"), ["wrong answer"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_each_fault_is_named(name: str) -> None:
    reply, expected = BROKEN[name]
    reasoning, text = reply if isinstance(reply, tuple) else (None, reply)
    written = Written(text.removesuffix(CUT), reasoning, not text.endswith(CUT))
    found = measure(ASKED, written, reading_of([written], Markers(), None))
    assert list(faults(found)) == expected
    block = {"no thinking block", "block never closed", "cut off while thinking", "empty block"}
    assert found.whole == (not {*block, "several blocks"} & set(expected))


def test_template_that_opens_the_block_is_seen_from_the_answers() -> None:
    opened = Written("Two.\n</think>\n\nIt is 4.", None, finished=True)
    endless = Written("Two.", None, finished=False)
    how = reading_of([opened, endless], Markers(), None)
    assert not list(faults(measure(ASKED, opened, how)))
    assert next(faults(measure(ASKED, endless, how))) == "cut off while thinking"
    how = reading_of([endless], Markers(), None)
    assert next(faults(measure(ASKED, endless, how))) == "no thinking block"


def test_instructions_are_checked_on_the_response_alone() -> None:
    asked = Asked("p:1", "?", (Instruction("start:phrase", {"phrase": "Here"}),))
    how = reading_of([], Markers(), opens=False)
    good = Written("<think>\na\n</think>\n\nHere it is.", None, finished=True)
    bad = Written("<think>\nHere\n</think>\n\nIt is.", None, finished=True)
    assert measure(asked, good, how).obedient is True
    assert list(faults(measure(asked, bad, how))) == ["instruction not followed"]


def test_tokens_are_those_that_were_counted() -> None:
    found = measure(
        ASKED,
        Written("<think>aaaa</think>bb", None, finished=True, tokens=30),
        reading_of([], Markers(), opens=False),
    )
    assert (found.thinking, found.answering) == pytest.approx((20, 10))


# Keys


@pytest.mark.parametrize(
    ("key", "response", "right"),
    [
        ("42", "It is 41; no, the answer is **42**. I checked it 3 times.", True),
        ("42", "It is 42. I checked it 3 times.", False),
        ("1024", "That makes 1,024", True),
        ("-3", "x = \u22123.", True),
        ("3/4", "\\boxed{\\dfrac{3}{4}}", True),
        ("0.5", "The answer: 1/2", True),
        ("7", "70", False),
        ("7", "", False),
        ("7", "1/0", False),
        ("Paris", "The answer is Paris.", True),
        ("Paris", "First Rome.\n\n**Paris**", True),
        ("Paris", "Not Paris but Rome", False),
    ],
)
def test_keys(key: str, response: str, right: bool) -> None:
    assert AnswerKey((key,)).right(response) is right


def test_last_choice_and_words_in_order() -> None:
    key = AnswerKey(("no",), ("yes", "no"))
    assert key.right("Yes, it may seem so; but no.")
    assert not key.right("No? Yes.")
    assert not key.right("I know nothing.")
    words = AnswerKey(("one", "leaves"))
    assert words.right("answer : ONE LEAVES")
    assert not words.right("leaves one")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"answer": 4}, ("4",)),
        ({"answer": "5 + 4 = 9\n#### 9"}, ("9",)),
        ({"answer": "a long\nsolution"}, None),
        ({}, None),
    ],
)
def test_keys_of_files(content: dict[str, Any], parts: tuple[str, ...] | None) -> None:
    found = read_key(JsonFields("f:1", JsonObject(list(content.items()))))
    assert (None if found is None else found.parts) == parts


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"answer": True}, "must be a text, a number"),
        ({"answer": "maybe", "choices": ["yes", "no"]}, "not among the 'choices'"),
    ],
)
def test_keys_that_cannot_be_used(content: dict[str, Any], words: str) -> None:
    with pytest.raises(RainError, match=words):
        read_key(JsonFields("f:1", JsonObject(list(content.items()))))


# The prompts that come with the package


def test_own_prompts_are_those_of_the_script() -> None:
    shipped = resources.files("rain_mergekit").joinpath("evaluation", generator.FILE.name)
    assert shipped.read_text(encoding="utf-8") == generator.text()
    found = own_prompts()
    kinds = {prompt.kind for prompt in found}
    assert kinds == {"arithmetic", "logic", "general", "constraint", "both"}
    assert len({prompt.text for prompt in found}) == len(found) == 332
    assert all((p.key is not None) == (p.kind in {"arithmetic", "logic", "both"}) for p in found)
    assert all(bool(p.instructions) == (p.kind in {"constraint", "both"}) for p in found)


def test_keys_of_expressions_are_right() -> None:
    seen = 0
    for prompt in own_prompts():
        text = prompt.text.partition("?")[0].removeprefix("What is ")
        if prompt.key is not None and set(text) <= set("0123456789 +-*"):
            assert eval(text) == prompt.key.number  # noqa: S307 - digits and signs only
            seen += 1
    assert seen > 10


# Through a server


def prompts(folder: Path, count: int = 12) -> Path:
    path = folder / "prompts.jsonl"
    records = [{"prompt": f"What is {i} + 4?", "answer": i + 4} for i in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def right(prompt: str) -> str:
    total = int(prompt.split()[2]) + 4
    return f"<think>\nAdd four.\n</think>\n\nThe answer is {total}."


def ask(url: str, folder: Path, out: str, *more: object) -> tuple[object, ...]:
    return ("ask", "m", "--server", url, "-o", folder / out, "--prompts", prompts(folder), *more)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    with serving(right) as server:
        succeed(*ask(server.url, folder, "good.jsonl"))
    return folder / "good.jsonl"


def worse(how: str) -> Callable[[str], Reply]:
    """Every prompt answered in one broken way, rightly where that leaves an answer."""

    def reply(prompt: str) -> Reply:
        whole = right(prompt)
        total = whole.rstrip(".").split()[-1]
        return {
            "whole": f"The answer is {total}.",
            "unclosed": "<think>\nAdd four.",
            "several": f"{whole}\n<think>\nOr so.\n</think>\n\nThe answer is {total}.",
            "empty": f"<think>\n</think>\n\nThe answer is {total}.",
            "cut": whole + CUT,
            "looped": whole.replace("four.", "four." + " Let me check that again." * 20),
            "switched": whole.replace("Add four", CHINESE),
            "correct": whole.replace(total, "1000"),
        }[how]

    return reply


@pytest.mark.parametrize(
    "how", ["whole", "unclosed", "several", "empty", "cut", "looped", "switched", "correct"]
)
def test_a_broken_merge_is_named_and_breaks_its_bound(how: str, good: Path, tmp_path: Path) -> None:
    with serving(worse(how)) as server:
        succeed(*ask(server.url, tmp_path, "merged.jsonl"))
    outcome = run(
        "compare", good, tmp_path / "merged.jsonl", "--bound", f"{how}=5", "--json", "--examples", 0
    )
    assert outcome.code == 3
    (pair,) = json.loads(outcome.stdout)["pairs"]
    assert pair["bounds_broken"] == [how]
    verdicts = {item["metric"]: item["verdict"] for item in pair["differences"]}
    assert verdicts[how] == "worse"
    assert next(m.label for m in METRICS if m.name == how) in pair["verdict"]


def test_a_good_merge_passes(good: Path, tmp_path: Path) -> None:
    with serving(right) as server:
        succeed(*ask(server.url, tmp_path, "merged.jsonl"))
    bounds = [f"--bound={metric.name}=1" for metric in METRICS]
    said = succeed("compare", good, tmp_path / "merged.jsonl", *bounds)
    assert "no loop in 12 prompts" in said
    assert "Verdict: merged: " in said
    assert "worse" not in said
    assert "few prompts (12) say little" in said


def test_page_shows_both_answers_and_escapes_them(good: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with serving(lambda _prompt: "<think>\nno\n</think>\n\n<script>alert(1)</script>") as server:
        succeed(*ask(server.url, tmp_path, "merged.jsonl"))
    page = tmp_path / "page.html"
    succeed("compare", good, tmp_path / "merged.jsonl", "--html", page)
    text = page.read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in text
    assert "<script" not in text
    assert text.count("<svg") == 2
    assert "What is 0 + 4?" in text
    assert "is not an HTML page" in refused(
        tmp_path, "compare", good, good, "--html", tmp_path / "merged.jsonl"
    )


@pytest.mark.parametrize("fault", [429, 500, 503, "cut", "garbage", "strange"])
def test_faults_of_a_server_are_tried_again(
    fault: int | str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rain_mergekit.data_building.server.PAUSE", 0.0)
    with serving(right, [fault, fault]) as server:
        succeed(*ask(server.url, tmp_path, "again.jsonl"))
        assert len(server.asked) == 14
    assert sorted((tmp_path / "again.jsonl").read_text().splitlines()[1:]) == sorted(
        good.read_text().splitlines()[1:]
    )


def test_no_finished_answer_is_lost_and_the_run_goes_on(tmp_path: Path) -> None:
    """The first request never comes back; what others have finished by then is kept."""
    with serving(right, ["hang"]) as server:
        command = ask(server.url, tmp_path, "a.jsonl", "--retries", 0, "--timeout", 1)
        outcome = run(*command, "--parallel", 3)
        assert outcome.code == 1
        assert "the same command goes on" in outcome.output
        kept = len((tmp_path / "a.jsonl").read_text().splitlines()) - 1
        assert kept >= 2
        before = len(server.asked)
        assert f"{12 - kept} new answer" in succeed(*command)
        assert len(server.asked) == before + 12 - kept
        assert "0 new answers" in succeed(*command)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert len(lines) == 13
    assert len({json.loads(line)["key"] for line in lines[1:]}) == 12


@pytest.mark.parametrize("fault", [404, 429, 500, 503, "cut", "garbage", "strange", "hang"])
def test_no_lasting_fault_loses_a_finished_answer(fault: int | str, tmp_path: Path) -> None:
    """Five requests are answered, and from then on none; 404: the model's name is not known."""
    with serving(right, [*[None] * 5, *[fault] * 100]) as server:
        command = ask(server.url, tmp_path, "a.jsonl", "--retries", 0, "--timeout", 2)
        outcome = run(*command, "--parallel", 2)
        assert outcome.code == 1
        reason = "as model 'm': HTTP 404" if fault == 404 else "the same command goes on"
        assert reason in outcome.output
        kept = (tmp_path / "a.jsonl").read_text().splitlines()[1:]
        assert len(kept) == 5
        server.faults.clear()
        server.asked.clear()
        assert "7 new answers" in succeed(*command)
        assert len(server.asked) == 7
    lines = (tmp_path / "a.jsonl").read_text().splitlines()[1:]
    assert lines[:5] == kept
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == 12


def test_server_that_answers_nothing(tmp_path: Path) -> None:
    with serving(right, [400] * 12) as server:
        outcome = run(*ask(server.url, tmp_path, "a.jsonl"))
        assert outcome.code == 1
        assert "answers none of the prompts: refused by the server: HTTP 400" in outcome.output
        assert "12 new answers" in succeed(*ask(server.url, tmp_path, "a.jsonl"))


@pytest.mark.slow  # it starts another program that loads a model
def test_transformers_own_server(tmp_path: Path) -> None:
    """The same answers as in this process; needs what `transformers[serving]` installs."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("openai")
    model, url = TRIO / "reasoning", f"http://127.0.0.1:{free_port()}/v1"
    command = (sys.executable, "-m", "transformers.cli.transformers", "serve", model)
    place = ("--port", url.rpartition(":")[2].removesuffix("/v1"), "--host", "127.0.0.1")
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join((TRIO / "test.jsonl").read_text().splitlines(keepends=True)[:6]))
    how = ("--prompts", path, "--max-new-tokens", 96, "--temperature", 0)
    with subprocess.Popen([*map(str, command), *place, "--dtype", "float32"]) as process:
        try:
            await_listener(process, url)
            remote = tmp_path / "remote.jsonl"
            succeed("ask", model, "--server", url, "-o", remote, *how, "--retries", 6)
        finally:
            process.terminate()
    succeed("ask", model, "-o", tmp_path / "here.jsonl", *how)
    found = [read_answers(str(tmp_path / f"{name}.jsonl")) for name in ("remote", "here")]
    pairs = zip(*(one.answers for one in found), strict=True)
    assert all(there.measured == here.measured for there, here in pairs)


def await_listener(process: subprocess.Popen[bytes], url: str) -> None:
    """Until somebody listens there, however long a loaded machine takes, or the process ends."""
    port = int(url.rpartition(":")[2].removesuffix("/v1"))
    while process.poll() is None:
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def test_line_that_was_cut_short_is_asked_for_again(good: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(good.read_bytes()[:-30])
    assert len(read_answers(str(torn)).answers) == 11
    with serving(right) as server:
        port = server.url.rpartition(":")[2]
        head, _, rest = torn.read_text().partition("\n")
        old = json.loads(head)["server"].rpartition(":")[2]
        torn.write_text(head.replace(old, f"{port}/chat/completions") + "\n" + rest)
        assert "1 new answer in" in succeed(*ask(server.url, tmp_path, "torn.jsonl"))
        assert len(server.asked) == 1


def test_several_samples_are_averaged(tmp_path: Path) -> None:
    seen: list[str] = []

    def half(prompt: str) -> str:
        seen.append(prompt)
        return right(prompt) if seen.count(prompt) == 1 else "<think>\nx\n</think>\n\n1000"

    with serving(half) as server:
        succeed(*ask(server.url, tmp_path, "a.jsonl", "--samples", 2))
    found = json.loads(run("compare", *[tmp_path / "a.jsonl"] * 2, "--json").stdout)
    model = found["models"][0]
    assert (model["prompts"], model["answers"]) == (12, 24)
    assert model["means"]["correct"] == 0.5
    assert model["faults"]["wrong answer"] == {"count": 12, "of": 24}
    rows = {item["metric"]: item for item in found["pairs"][0]["differences"]}
    assert rows["correct"]["difference"] == 0


def test_files_that_are_no_answers(good: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "?"}\n')
    assert "is not a file of answers" in refused(tmp_path, "compare", good, other)
    head = good.read_text().splitlines()[0]
    other.write_text(head + "\n")
    assert "holds no answers yet" in refused(tmp_path, "compare", good, other)
    other.write_text(head + '\n{"prompt": "?", "text": 1}\n')
    assert ":2: is no answer" in refused(tmp_path, "compare", good, other)
    other.write_text(head + '\n{"prompt": "else", "text": "", "finished": true}\n')
    assert "share no prompt" in refused(tmp_path, "compare", good, other)
    assert run("compare", good).code == 2
    assert run("compare", good, good, "--bound", "beauty=1").code == 2


# Statistics


def test_interval_equals_scipys_percentile_bootstrap() -> None:
    apart = torch.randn(80, dtype=torch.float64) + 0.2
    low, high = interval(apart, share=False)
    expected = bootstrap(
        (apart.numpy(),), np.mean, n_resamples=4000, method="percentile", **{SEED: 1}
    ).confidence_interval
    assert low == pytest.approx(expected.low, abs=0.02)
    assert high == pytest.approx(expected.high, abs=0.02)


def test_no_difference_so_far_is_no_proof_of_none() -> None:
    """About 3 / N, as many as can be there and not be seen."""
    for count in (20, 100, 1000):
        low, high = interval(torch.zeros(count, dtype=torch.float64), share=True)
        assert 1.5 / count < high < 4 / count
        assert -4 / count < low < -1.5 / count


def test_verdicts_need_size_and_certainty(good: Path) -> None:
    found = read_answers(str(good))
    whole = next(metric for metric in METRICS if metric.name == "whole")
    assert difference(found, found, whole, 0.02).verdict == "not known"  # type: ignore[union-attr]
    assert difference(found, found, whole, 0.5).verdict == "equal"  # type: ignore[union-attr]


# A model


def test_a_model_that_cannot_close_its_block(tmp_path: Path) -> None:
    """The close marker's row of the tied embedding is exchanged with that of another token."""
    broken = tmp_path / "broken"
    shutil.copytree(TRIO / "reasoning", broken)
    weights = load_file(broken / "model.safetensors")
    tokens = json.loads((broken / "tokenizer.json").read_text())
    ids = {**tokens["model"]["vocab"], **{t["content"]: t["id"] for t in tokens["added_tokens"]}}
    pair = [ids["</think>"], next(i for text, i in ids.items() if "moon" in text)]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name][pair] = weights[name][pair[::-1]].clone()
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join((TRIO / "test.jsonl").read_text().splitlines(keepends=True)[:12]))
    how = ("--prompts", path, "--max-new-tokens", 80, "--batch-size", 12)
    for name, model in (("reasoning", TRIO / "reasoning"), ("merged", broken)):
        succeed("ask", model, "-o", tmp_path / f"{name}.jsonl", *how)
    files = (tmp_path / "reasoning.jsonl", tmp_path / "merged.jsonl")
    outcome = run("compare", *files, "--bound", "unclosed=5", "--json")
    assert outcome.code == 3
    models = json.loads(outcome.stdout)["models"]
    faulty = models[1]["faults"]
    assert faulty["block never closed"]["count"] + faulty["cut off while thinking"]["count"] == 12
    assert models[0]["faults"]["block never closed"]["count"] == 0
    assert models[0]["means"]["correct"] > 0.9
    tokens_written = [json.loads(line)["tokens"] for line in files[0].read_text().splitlines()[1:]]
    assert all(isinstance(count, int) and 10 < count <= 80 for count in tokens_written)
