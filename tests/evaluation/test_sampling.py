"""How answers are drawn: as the model's makers recommend, several a prompt, and greedily beside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import model_hub
import pytest
from commands import TRIO, refused, run, succeed
from scripted_server import serving

from rain_mergekit.evaluation.answer_files import read_answers

# What the hub's client calls in its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
MAKERS = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 20,
    "repetition_penalty": None,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module", name="prompts")
def _prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join((TRIO / "test.jsonl").read_text().splitlines(keepends=True)[:3]))
    return path


def model(folder: Path, **settings: object) -> Path:
    """The packaged reasoning model with other settings for drawing tokens."""
    place = folder / "model"
    shutil.copytree(TRIO / "reasoning", place, dirs_exist_ok=True)
    content = json.loads((TRIO / "reasoning" / "generation_config.json").read_text())
    content.pop("_from_model_config")
    (place / "generation_config.json").write_text(json.dumps({**content, **settings}))
    return place


def written(path: Path) -> dict[tuple[str, int], str]:
    found = read_answers(str(path)).answers
    return {(answer.asked.text, answer.sample): answer.written.text for answer in found}


# In this process


def test_several_samples_as_the_makers_say_and_greedily_beside(
    prompts: Path, tmp_path: Path
) -> None:
    """At temperature 20 samples differ; with top_k 1 all of them are the greedy answer."""
    how = ("--prompts", prompts, "--samples", 3, "--max-new-tokens", 24, "--greedy")
    for name, more in (("wild", {}), ("tame", {"top_k": 1})):
        folder = model(tmp_path, do_sample=True, temperature=20.0, **more)
        said = succeed("ask", folder, "-o", tmp_path / f"{name}.jsonl", *how)
        assert f"9 new answers in {tmp_path}/{name}.jsonl" in said
        assert f"3 new answers in {tmp_path}/{name}.greedy.jsonl" in said
    plain = model(tmp_path)
    succeed("ask", plain, "-o", tmp_path / "plain.jsonl", *how[:-1])
    greedy = written(tmp_path / "wild.greedy.jsonl")
    assert greedy == written(tmp_path / "tame.greedy.jsonl")
    for (prompt, _), text in (*written(tmp_path / "tame.jsonl").items(),
                              *written(tmp_path / "plain.jsonl").items()):  # fmt: skip
        assert text == greedy[prompt, 0]
    wild = written(tmp_path / "wild.jsonl")
    assert len(set(wild.values())) == len(wild) == 9
    files = [tmp_path / f"{name}.greedy.jsonl" for name in ("wild", "tame")]
    assert "few prompts (3) say little" in succeed("compare", *files)


def test_greedy_beside_greedy_is_a_mistake(prompts: Path, tmp_path: Path) -> None:
    how = ("--prompts", prompts, "--greedy", "--temperature", 0)
    assert run("ask", TRIO / "reasoning", "-o", tmp_path / "a.jsonl", *how).code == 2


def test_continuous_batching_writes_the_same(prompts: Path, tmp_path: Path) -> None:
    """Greedily; each answer is kept as it is finished, and none is asked for twice."""
    how = ("--prompts", prompts, "--max-new-tokens", 60, "--temperature", 0)
    files = [tmp_path / f"{name}.jsonl" for name in ("batches", "continuous")]
    for path, more in zip(files, ((), ("--continuous",)), strict=True):
        succeed("ask", TRIO / "reasoning", "-o", path, *how, *more)
    assert written(files[0]) == written(files[1])
    tokens = [{a.asked.text: a.written.tokens for a in read_answers(str(f)).answers} for f in files]
    assert tokens[0] == tokens[1]
    kept = files[1].read_text().splitlines(keepends=True)[:-1]
    files[1].write_text("".join(kept))
    command = ("ask", TRIO / "reasoning", "-o", files[1], *how)
    assert "1 new answer in" in succeed(*command, "--continuous")
    assert "made with another continuous" in refused(tmp_path, *command)


# Through a server


@pytest.fixture(name="asked")
def _asked(prompts: Path, tmp_path: Path) -> Iterator[Any]:
    """What the server gets in each request, whatever is asked of it."""
    with serving(lambda _prompt: "<think>\nx\n</think>\n\nyes") as server:

        def ask(name: str, *more: object) -> list[dict[str, Any]]:
            server.requests.clear()
            how = ("--server", server.url, "--prompts", prompts, *more)
            succeed("ask", "m", "-o", tmp_path / f"{name}.jsonl", *how)
            return list(server.requests)

        yield ask


def drawing(request: dict[str, Any]) -> dict[str, Any]:
    usual = ("model", "messages", "max_tokens", "seed")
    return {name: value for name, value in request.items() if name not in usual}


def test_a_server_is_told_what_the_makers_say(asked: Any, tmp_path: Path) -> None:
    assert all(drawing(one) == {} for one in asked("own", "--samples", 2))
    folder = model(tmp_path, **MAKERS)
    how = ("--sampling-of", folder, "--samples", 2, "--greedy")
    found = asked("makers", *how)
    assert [drawing(one) for one in found] == (
        [{"temperature": 0.6, "top_p": 0.95, "top_k": 20}] * 6
        + [{"temperature": 0.0, "top_p": 0.95, "top_k": 20}] * 3
    )
    assert len({one["seed"] for one in found[:6]}) == 6
    (other,) = {one["temperature"] for one in asked("mine", *how[:2], "--temperature", 0.1)}
    assert other == 0.1
    plain = asked("plain", "--sampling-of", model(tmp_path))
    assert [drawing(one) for one in plain] == [{"temperature": 0}] * 3


def test_answers_drawn_in_two_ways_are_not_mixed(prompts: Path, tmp_path: Path) -> None:
    with serving(lambda _prompt: "<think>\nx\n</think>\n\nyes") as server:
        command = ("ask", "m", "--server", server.url, "--prompts", prompts)
        succeed(*command, "-o", tmp_path / "a.jsonl")
        makers = ("--sampling-of", model(tmp_path, **MAKERS))
        said = run(*command, *makers, "-o", tmp_path / "a.jsonl")
    assert said.code == 1
    assert "were made with another drawing" in said.output


def test_settings_of_a_model_on_the_hub(
    asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One small file is fetched, no weights."""
    with model_hub.hub({"me/model": model(tmp_path, **MAKERS)}) as found:
        model_hub.use(found, monkeypatch, tmp_path / "cache")
        requests = asked("hub", "--sampling-of", "me/model")
    assert drawing(requests[0])["top_k"] == 20
    assert found.sent(".safetensors") == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no generation_config.json"),
        ("[]", "expected a JSON object of settings"),
        ('{"do_sample": true, "top_p": "high"}', "top_p is no number"),
        ('{"do_sample": true, "top_p": NaN}', "top_p is no number"),
    ],
)
def test_settings_that_cannot_be_used(content: str | None, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if content is not None:
        (folder / "generation_config.json").write_text(content)
    command = ("ask", "m", "--server", "http://127.0.0.1:9", "-o", tmp_path / "a.jsonl")
    assert words in refused(tmp_path, *command, "--sampling-of", folder)
