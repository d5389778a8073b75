"""`mergekit-rain data`: sets built from a model's own answers, here and behind a real server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import MAIN, TRIO, refused, run, succeed
from hangs import HANGS
from watching import untouched

from rain_mergekit.data_building.balance import Candidate, choose
from rain_mergekit.data_building.journal import SUFFIX
from rain_mergekit.data_building.judge import DroppedError, keep
from rain_mergekit.data_building.prompts import gather_prompts, read_prompts
from rain_mergekit.data_building.tasks import Written
from rain_mergekit.models.generation import render_prompt
from rain_mergekit.models.loading import LoadOptions, open_checkpoint
from rain_mergekit.models.tokenizer import load_tokenizer
from rain_mergekit.text.calibration_sets import load_reasoning
from rain_mergekit.text.markers import Markers

REASONING = TRIO / "reasoning"
SETS = Path(__file__).parents[2] / "calibration"
SHORT = ("--max-new-tokens", 96)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server process on this machine over the trio's reasoning model."""
    server = Path(__file__).parents[1] / "support" / "openai_server.py"
    command = [sys.executable, str(server), str(REASONING)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port, "the server did not start"
        yield f"http://127.0.0.1:{port}"
        process.terminate()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(open_checkpoint(str(REASONING), LoadOptions()))


def seen(server: str) -> list[dict[str, Any]]:
    """All requests that the server has had."""
    with urllib.request.urlopen(server) as response:  # noqa: S310 - on this machine
        found: list[dict[str, Any]] = json.loads(response.read())["seen"]
        return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ask(folder: Path, count: int = 6) -> Path:
    """Held-out prompts of the trio in two domains."""
    records = lines(TRIO / "test.jsonl")[:count]
    found = [
        {"prompt": record["prompt"], "domain": record["constraint"] or "none"} for record in records
    ]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in found))
    return path


def from_server(server: str, way: str, folder: Path, *more: object) -> tuple[object, ...]:
    """The command's arguments."""
    name = f"trio:{way}" if way else "trio"
    out = ("-o", folder / "set.jsonl")
    return ("data", "reasoning", "--server", server, "--model", name, *SHORT, *out, *more)


# What is kept


@pytest.mark.parametrize(
    ("text", "reasoning", "reason"),
    [
        ("<think>\na\n</think>\n\nb", None, None),
        ("a\n</think>\n\nb", None, None),
        ("\n\nb", "\na\n", None),
        ("b", "a", "taken apart by the server"),
        ("\nb", "a", "taken apart by the server"),
        ("b", "a\n", "taken apart by the server"),
        ("\nb", "", "nothing in the thinking"),
        ("<think>\n</think>b", None, "nothing in the thinking"),
        ("<think>a</think> ", None, "nothing after the thinking"),
        ("a", None, "not exactly one"),
        ("<think>a", None, "not exactly one"),
        ("<think>a</think>b</think>", None, "not exactly one"),
        ("<think>a<think>b</think>c", None, "not exactly one"),
        ("x<think>a</think>b", None, "text before the thinking"),
        ("</think><think>", None, "text before the thinking"),
        ("\nb</think>", "a\n", "not exactly one"),
    ],
)
def test_only_one_complete_block_is_kept(
    text: str, reasoning: str | None, reason: str | None
) -> None:
    written = Written(text, reasoning, finished=True)
    if reason is None:
        kept = keep(written, Markers(), opened_by_template=None)
        assert (kept.thinking, kept.response) == ("a", "b")
        return
    with pytest.raises(DroppedError, match=reason):
        keep(written, Markers(), opened_by_template=None)


def test_template_decides_whether_the_marker_may_be_missing() -> None:
    written, markers = Written("a]]b", None, finished=True), Markers("[[", "]]")
    assert keep(written, markers, opened_by_template=True).thinking == "a"
    with pytest.raises(DroppedError):
        keep(written, markers, opened_by_template=False)
    with pytest.raises(DroppedError, match="cut off"):
        keep(Written("[[a]]b", None, finished=False), markers, opened_by_template=None)


def test_domains_and_lengths_are_balanced() -> None:
    sizes = {"a": 40, "b": 8, "c": 3}
    found = [
        Candidate({"n": i}, (domain,), 10 + 90 * (i % 4))
        for domain in sizes
        for i in range(sizes[domain])
    ]
    chosen = choose(found, 15, seed=1)
    assert Counter(item.groups[0] for item in chosen) == {"a": 6, "b": 6, "c": 3}
    lengths = Counter(item.length for item in chosen if item.groups == ("a",))
    assert set(lengths.values()) <= {1, 2}
    assert chosen == choose(found, 15, seed=1)
    assert chosen != choose(found, 15, seed=2)
    assert choose(found, 6, seed=1) == chosen[:6]
    assert len(choose(found, None, seed=1)) == len(found)
    assert choose([], 3, seed=1) == []


# A model in this process


def test_local_model_builds_a_set(tmp_path: Path, tokenizer: Any) -> None:
    prompts = ask(tmp_path, 9)
    out = tmp_path / "set.jsonl"
    command = ("data", "reasoning", "--model", REASONING, "--prompts", prompts, "-o", out, *SHORT)
    with untouched(TRIO, prompts):
        said = succeed(*command, "--count", 6, "--batch-size", 4)
    assert "Wrote" in said
    assert f"Next: mergekit-rain data check {out} --model {REASONING}" in said
    found = lines(out)
    assert len(found) == 6
    data = load_reasoning(out, tokenizer, keep_response=True)
    assert not data.skipped
    # Rendered and tokenised, each sample is what the model has seen and generated, token by token.
    for sample, tokens in zip(found, data.samples, strict=True):
        assert (
            list(tokens.input_ids) == greedy(sample["prompt"], tokenizer)[: len(tokens.input_ids)]
        )
    assert "9 answers, 0 of them new" in succeed(*command, "--count", 9)
    assert len(lines(out)) == 9


def greedy(prompt: str, tokenizer: Any) -> list[int]:
    """Head and answer as ids, by transformers alone."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(REASONING, dtype="float32")
    head = tokenizer(
        render_prompt(tokenizer, prompt), return_tensors="pt", add_special_tokens=False
    )
    found: list[int] = model.generate(
        input_ids=head["input_ids"], attention_mask=head["attention_mask"], max_new_tokens=96
    )[0].tolist()
    return found


def test_prompts_with_constraints_are_a_domain_of_their_own(tmp_path: Path) -> None:
    """Plain prompts and an instruction set in two files: each text once, both kinds alike."""
    plain = [{"prompt": item["prompt"], "domain": item["domain"]} for item in lines(ask(tmp_path))]
    asked = lines(TRIO / "instruction.jsonl")[:3]
    assert len({item["domain"] for item in plain}) > 1
    files = [tmp_path / "plain.jsonl", tmp_path / "asked.jsonl", tmp_path / "both.jsonl"]
    for path, found in zip(files, [plain, asked, [plain[0], asked[0]]], strict=True):
        path.write_text("".join(json.dumps(item) + "\n" for item in found))
    out = tmp_path / "set.jsonl"
    options = [part for path in files for part in ("--prompts", path)]
    said = succeed("data", "reasoning", "--model", REASONING, *options, *SHORT, "-o", out)
    assert f"{len(plain) + 3} prompts" in said
    domains = {item["prompt"]: item["domain"] for item in lines(out)}
    expected = {item["prompt"]: item["domain"] for item in plain}
    assert domains == {**expected, **{item["prompt"]: "constrained" for item in asked}}
    few = ("--count", len(set(domains.values())), "-o", out)
    succeed("data", "reasoning", "--model", REASONING, *options, *SHORT, *few)
    assert Counter(item["domain"] for item in lines(out)) == dict.fromkeys(domains.values(), 1)


def test_prompts_in_the_layout_of_ifeval_are_constrained(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    found = [
        {"prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {"prompt": "b", "instruction_id_list": [], "kwargs": []},
        {"prompt": "c", "related_prompt_list": [{}], "domain": "mine"},
    ]
    path.write_text("".join(json.dumps(item) + "\n" for item in found))
    assert [item.domain for item in read_prompts(path)] == ["constrained", "", "mine"]


def test_prompts_of_the_package(server: str, tmp_path: Path) -> None:
    """As many with constraints as without, from the whole length of the instruction set."""
    prompts = gather_prompts([])
    domains = Counter(item.domain for item in prompts)
    assert len(domains) >= 6
    assert 2 * domains["constrained"] == len(prompts) == len({item.text for item in prompts})
    known = [item["prompt"] for item in lines(SETS / "instruction.jsonl")]
    places = [known.index(item.text) for item in prompts if item.domain == "constrained"]
    assert places[0] < 0.1 * len(known) < 0.9 * len(known) < places[-1]
    outcome = run(*from_server(server, "down", tmp_path, "--retries", 0))
    assert f": {len(prompts)} prompts" in outcome.output


def test_interrupted_run_goes_on_the_same(tmp_path: Path) -> None:
    """Drawn at random: what is missing is made as it would have been, in its own batch."""
    prompts = ask(tmp_path, 6)
    command = ("data", "reasoning", "--model", REASONING, "--prompts", prompts, *SHORT)
    command = (*command, "--temperature", 2.0, "--seed", 7, "--batch-size", 3, "--attempts", 2)
    whole, again = tmp_path / "whole.jsonl", tmp_path / "again.jsonl"
    succeed(*command, "-o", whole)
    journal = Path(f"{whole}{SUFFIX}").read_bytes()
    assert len(journal.splitlines()) >= 7
    torn = journal.splitlines(keepends=True)
    Path(f"{again}{SUFFIX}").write_bytes(b"".join(torn[:3]) + torn[3][:20])
    said = succeed(*command, "-o", again)
    assert "2 answers in" in said
    assert f"{len(torn) - 1} answers, {len(torn) - 3} of them new" in said
    assert again.read_bytes() == whole.read_bytes()
    other = tmp_path / "other.jsonl"
    succeed(*command[:-6], "--seed", 8, "-o", other)
    assert {s["output"] for s in lines(other)} != {s["output"] for s in lines(whole)}


# A server


def test_server_gives_the_same_answers(server: str, tmp_path: Path) -> None:
    """The prompts as text, one a line; greedy decoding is the same here and there."""
    prompts = tmp_path / "prompts.txt"
    texts = [item["prompt"] for item in lines(ask(tmp_path, 4))]
    prompts.write_text("\n".join([*texts, "", texts[0]]) + "\n")
    succeed(*from_server(server, "", tmp_path, "--prompts", prompts, "--top-p", 0.9))
    local = tmp_path / "local.jsonl"
    succeed("data", "reasoning", "--model", REASONING, "--prompts", prompts, "-o", local, *SHORT)
    assert sorted(map(str, lines(tmp_path / "set.jsonl"))) == sorted(map(str, lines(local)))
    request = seen(server)[-1]
    assert (request["max_tokens"], request["top_p"]) == (96, 0.9)
    assert "temperature" not in request
    assert request["authorization"] is None


def test_server_that_takes_the_thinking_out(server: str, tmp_path: Path) -> None:
    """Put back between the markers, it is what the same server writes without a parser."""
    sets = []
    for way in ("", "apart"):
        folder = tmp_path / (way or "whole")
        folder.mkdir()
        succeed(*from_server(server, way, folder, "--prompts", ask(folder, 4)))
        sets.append(sorted(map(str, lines(folder / "set.jsonl"))))
    assert sets[0] == sets[1]


def test_thinking_that_cannot_be_put_back_verbatim_is_refused(server: str, tmp_path: Path) -> None:
    prompts = ask(tmp_path, 2)
    outcome = run(*from_server(server, "stripped", tmp_path, "--prompts", prompts))
    assert outcome.code == 1
    assert "can be kept (2 taken apart by the server, without the white space" in outcome.output


def test_known_markers_of_a_server_are_told_from_its_answers(server: str, tmp_path: Path) -> None:
    succeed(*from_server(server, "other", tmp_path, "--prompts", ask(tmp_path, 2)))
    found = lines(tmp_path / "set.jsonl")
    assert all(item["output"].startswith("<reasoning>") for item in found)
    assert "2 of 2 samples usable" in succeed("data", "check", tmp_path / "set.jsonl")


def test_template_arguments_reach_the_server_and_the_model(server: str, tmp_path: Path) -> None:
    """With another opening the answers begin in the middle of the block."""
    model = tmp_path / "model"
    shutil.copytree(REASONING, model)
    template = model / "chat_template.jinja"
    opening = "{%- if hurry is defined and hurry %}{{ '<think>' }}{%- endif %}"
    template.write_text(template.read_text() + opening)
    prompts, out = ask(tmp_path, 3), tmp_path / "local.jsonl"
    arguments = ("--chat-template-kwargs", '{"hurry": true}')
    command = ("data", "reasoning", "--model", model, "--prompts", prompts, "-o", out, *SHORT)
    said = succeed(*command, "--markers", "<think>", "</think>", *arguments)
    check = f"data check {out} --model {model} --chat-template-kwargs '{{\"hurry\": true}}'"
    assert f"{check} --markers '<think>' '</think>'" in said
    assert all("<think>" not in item["output"] for item in lines(out))
    assert "made with another chat_template_kwargs;" in refused(tmp_path, *command)
    extra = ("--extra-body", '{"separate_reasoning": false}')
    succeed(*from_server(server, "", tmp_path, "--prompts", prompts, *arguments, *extra))
    request = seen(server)[-1]
    assert request["chat_template_kwargs"] == {"hurry": True}
    assert request["separate_reasoning"] is False


def test_server_whose_template_opens_the_block(server: str, tmp_path: Path) -> None:
    prompts = ask(tmp_path, 3)
    succeed(*from_server(server, "opened", tmp_path, "--prompts", prompts))
    assert all("<think>" not in item["output"] for item in lines(tmp_path / "set.jsonl"))
    assert "3 of 3 samples usable" in succeed("data", "check", tmp_path / "set.jsonl")


def test_seed_and_key_reach_the_server(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "s3cret")
    prompts = ask(tmp_path, 3)
    options = ("--temperature", 0.8, "--seed", 5, "--api-key-env", "SOME_KEY", "--parallel", 3)
    said = succeed(*from_server(server, "", tmp_path, "--prompts", prompts, *options))
    first = (tmp_path / "set.jsonl").read_bytes()
    requests = seen(server)[-3:]
    assert {item["authorization"] for item in requests} == {"Bearer s3cret"}
    assert len({item["seed"] for item in requests}) == 3
    for file in tmp_path.glob("set.jsonl*"):
        assert b"s3cret" not in file.read_bytes()
        file.unlink()
    assert "s3cret" not in said
    succeed(*from_server(server, "", tmp_path, "--prompts", prompts, *options))
    assert (tmp_path / "set.jsonl").read_bytes() == first


def test_failing_requests_are_tried_again(server: str, tmp_path: Path) -> None:
    prompts = ask(tmp_path, 3)
    succeed(*from_server(server, "flaky", tmp_path, "--prompts", prompts, "--parallel", 1))
    assert len(lines(tmp_path / "set.jsonl")) == 3


@pytest.mark.parametrize(
    ("way", "options", "words"),
    [
        ("down", (), "HTTP 503 (busy)"),
        ("garbage", (), "not a chat completion"),
        ("strange", (), "not a chat completion"),
        ("cut", (), "no usable answer"),
        ("hang", ("--timeout", 0.5), "timed out"),
    ],
)
def test_server_of_no_use(
    way: str, options: tuple[object, ...], words: str, server: str, tmp_path: Path
) -> None:
    prompts = ask(tmp_path, 2)
    outcome = run(
        *from_server(server, way, tmp_path, "--prompts", prompts, "--retries", 0, *options)
    )
    assert outcome.code == 1
    assert words in outcome.output
    assert "the same command goes on" in outcome.output
    assert not (tmp_path / "set.jsonl").exists()


def test_nobody_answers_there(tmp_path: Path) -> None:
    prompts = ask(tmp_path, 2)
    command = from_server("http://127.0.0.1:9", "", tmp_path, "--prompts", prompts)
    outcome = run(*command, "--retries", 0)
    assert outcome.code == 1
    assert "refused" in outcome.output


def test_unknown_model_ends_the_run_at_once(server: str, tmp_path: Path) -> None:
    prompts, before = ask(tmp_path, 100), len(seen(server))
    command = from_server(server, "", tmp_path, "--prompts", prompts, "--model", "other")
    outcome = run(*command, "--parallel", 1)
    assert outcome.code == 1
    assert "HTTP 404 (The model `other` does not exist.)" in outcome.output
    assert len(seen(server)) < before + 50  # those that were on the way


def test_prompt_that_a_server_refuses_costs_only_itself(server: str, tmp_path: Path) -> None:
    prompts = ask(tmp_path, 6)
    books = sum("books" in item["prompt"] for item in lines(prompts))
    assert 0 < books < 6
    said = succeed(*from_server(server, "picky", tmp_path, "--prompts", prompts))
    assert f"{books} refused by the server: HTTP 400 (the prompt is too long)" in said
    assert len(lines(tmp_path / "set.jsonl")) == 6 - books


def test_killed_run_goes_on(server: str, tmp_path: Path) -> None:
    """`kill -9` while answers come: nothing is half written, and none is asked for twice."""
    prompts = ask(tmp_path, 16)
    arguments = from_server(server, "held", tmp_path, "--prompts", prompts, "--parallel", 2)
    command = [sys.executable, "-c", MAIN, *map(str, arguments)]
    journal = tmp_path / f"set.jsonl{SUFFIX}"
    before = len(seen(server))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + HANGS
        while not journal.exists() or len(journal.read_bytes().splitlines()) < 4:
            assert time.monotonic() < end
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    seen(f"{server}/go")
    assert not (tmp_path / "set.jsonl").exists()
    kept = len(lines(journal)) - 1
    assert 3 <= kept < 16
    said = succeed(*arguments)
    assert f"16 answers, {16 - kept} of them new" in said
    assert len(lines(tmp_path / "set.jsonl")) == 16
    in_flight = 4
    assert len(seen(server)) - before <= 16 + in_flight


def test_nothing_usable_says_why(server: str, tmp_path: Path) -> None:
    prompts = ask(tmp_path, 2)
    command = from_server(server, "", tmp_path, "--prompts", prompts, "--max-new-tokens", 3)
    outcome = run(*command)
    assert outcome.code == 1
    assert "no answer of 2 can be kept (2 cut off by the token limit)" in outcome.output


# Files


def test_too_few_is_said(server: str, tmp_path: Path) -> None:
    prompts = ask(tmp_path, 3)
    said = succeed(*from_server(server, "", tmp_path, "--prompts", prompts, "--count", 5))
    assert "3 of 5 samples: give more prompts" in said


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    prompts = ask(tmp_path, 2)
    command = ("data", "reasoning", "--model", REASONING, "--prompts", prompts, *SHORT)
    mine = tmp_path / "mine.jsonl"
    mine.write_text("{}\n")
    assert "was not made by" in refused(tmp_path, *command, "-o", mine)
    (tmp_path / f"a.jsonl{SUFFIX}").write_text("my diary\n")
    assert "holds no answers of" in refused(tmp_path, *command, "-o", tmp_path / "a.jsonl")
    out = tmp_path / "b.jsonl"
    succeed(*command, "-o", out)
    said = refused(tmp_path, *command, "-o", out, "--seed", 3)
    assert "made with another seed;" in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no prompts"),
        ('{"question": "?"}', "'prompt' is missing or blank"),
        ("[1]", "must be a JSON object"),
    ],
)
def test_prompts_that_cannot_be_read(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / ("prompts.jsonl" if content else "prompts.txt")
    path.write_text(content + "\n")
    command = ("data", "reasoning", "--model", REASONING, "--prompts", path)
    assert words in refused(tmp_path, *command, "-o", tmp_path / "set.jsonl")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--server", "localhost:8000"), "is not the address of a server"),
        (("--server", "file:///etc/passwd"), "is not the address of a server"),
        (("--server", "http://localhost:1", "--api-key-env", "NOT_SET_AT_ALL"), "holds no key"),
    ],
)
def test_options_that_cannot_be_right(options: tuple[str, ...], words: str, tmp_path: Path) -> None:
    prompts = ask(tmp_path, 1)
    command = ("data", "reasoning", "--model", "m", "--prompts", prompts, *options)
    assert words in refused(tmp_path, *command, "-o", tmp_path / "set.jsonl")
