"""Prompts from data sets of a hub: found by name over HTTP, and the layouts that sets have."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import model_hub
import pytest
from commands import TRIO, needs_rules, refused, run, succeed
from model_hub import Hub
from scripted_server import serving

from rain_mergekit.errors import RainError
from rain_mergekit.evaluation.answer_files import chosen_prompts, read_answers
from rain_mergekit.instructions.hub_files import HubSet, chosen_files

# What the hub's client calls in its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: "main/test-*"}
- config_name: other
  data_files: other/*.parquet
---
# A set
"""
FOLLOWED = {
    "prompt": "Say it without a comma.",
    "instruction_id_list": ["punctuation:no_comma", "startend:end_checker"],
    "kwargs": [{"end_phrase": None}, {"end_phrase": "end", "num_words": None}],
    "key": 7,
}


def sums(start: int, count: int, **more: object) -> list[dict[str, Any]]:
    numbers = range(start, start + count)
    return [{"question": f"What is {i} + 4?", "answer": f"{i}\n#### {i + 4}", **more}
            for i in numbers]  # fmt: skip


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    from pyarrow import Table  # noqa: PLC0415 - takes a while
    from pyarrow import parquet as written  # noqa: PLC0415

    path.parent.mkdir(parents=True, exist_ok=True)
    written.write_table(Table.from_pylist(rows), path)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    place = tmp_path / "hub"
    for name in ("plain", "tables", "rules"):
        (place / name).mkdir(parents=True)
    (place / "plain" / "test.jsonl").write_text(lines(sums(0, 3)))
    (place / "plain" / "train.jsonl").write_text(lines(sums(50, 40)))
    (place / "plain" / "dataset_infos.json").write_text("{}")
    (place / "tables" / "README.md").write_text(CARD)
    for number in range(2):
        rows = sums(10 * number, 2, kind=3)
        parquet(place / "tables" / "main" / f"test-0000{number}-of-00002.parquet", rows)
    parquet(place / "tables" / "main" / "train-00000-of-00001.parquet", sums(70, 1))
    parquet(place / "tables" / "other" / "all.parquet", [FOLLOWED])
    (place / "rules" / "input_data.jsonl").write_text(lines([FOLLOWED]))
    names = {f"datasets/me/{folder.name}": folder for folder in place.iterdir()}
    with model_hub.hub(names) as found:
        model_hub.use(found, monkeypatch, tmp_path / "cache")
        yield found


def test_a_model_is_asked_what_the_hub_holds(served: Hub, tmp_path: Path) -> None:
    """The test split where none is named; files of other splits are not fetched."""
    answers = tmp_path / "answers.jsonl"
    with serving(lambda prompt: f"<think>\nx\n</think>\n\n{int(prompt.split()[2]) + 4}") as server:
        succeed("ask", "m", "--server", server.url, "-o", answers, "--prompts", "hub:me/plain")
    found = read_answers(str(answers))
    assert len(found.answers) == 3
    assert all(answer.measured.correct for answer in found.answers)
    assert served.sent("/test.jsonl") > 0
    assert served.sent("/train.jsonl") == 0


def test_verify_takes_them_too(served: Hub) -> None:
    rows = [json.loads(line) for line in (TRIO / "test.jsonl").read_text().splitlines()[:2]]
    served.repositories["datasets/me/plain"].joinpath("test.jsonl").write_text(
        lines([{"question": row["prompt"], "answer": row["answer"]} for row in rows])
    )
    how = ("--prompts", "hub:me/plain:test:question", "--max-new-tokens", 96)
    said = succeed("verify", TRIO / "reasoning", "--against", TRIO / "reasoning", *how)
    assert "right 2 of 2 (before 2)" in said


def test_tables_in_several_files_and_configurations(served: Hub) -> None:
    found = chosen_prompts("hub:me/tables/main", None)
    assert [one.text for one in found] == [f"What is {i} + 4?" for i in (0, 1, 10, 11)]
    assert all(one.key is not None and one.kind == "" for one in found)
    (one,) = chosen_prompts("hub:me/tables/main:train", None)
    assert one.key is not None
    assert one.key.parts == ("74",)
    assert len(chosen_prompts("hub:me/plain@main:train", 5)) == 5
    assert served.sent("all.parquet") == 0


@needs_rules
@pytest.mark.parametrize("name", ["me/rules", "me/tables/other"])
def test_instructions_in_ifevals_layout(served: Hub, name: str) -> None:
    (one,) = chosen_prompts(f"hub:{name}", None)
    assert served.log
    assert [item.kind for item in one.instructions] == FOLLOWED["instruction_id_list"]
    assert [dict(item.kwargs) for item in one.instructions] == [{}, {"end_phrase": "end"}]


def test_conversations_give_their_first_turn(served: Hub) -> None:
    turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
    place = served.repositories["datasets/me/plain"] / "test.jsonl"
    place.write_text(lines([{"prompt": turns}, {"prompt": "Hello."}]))
    assert [one.text for one in chosen_prompts("hub:me/plain", None)] == ["Hello?", "Hello."]
    turns.insert(0, {"role": "system", "content": "Be kind."})
    other = served.repositories["datasets/me/rules"] / "input_data.jsonl"
    other.write_text(lines([{"prompt": turns}]))
    with pytest.raises(RainError, match="'prompt' must be a string, found a list"):
        chosen_prompts("hub:me/rules", None)


def test_what_was_fetched_serves_without_network(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = chosen_prompts("hub:me/plain", None)
    with model_hub.hub({}) as gone:
        pass  # nobody listens there now
    model_hub.use(gone, monkeypatch, tmp_path / "cache")
    assert [one.text for one in chosen_prompts("hub:me/plain", None)] == [o.text for o in first]
    with pytest.raises(RainError, match="no split 'train', but test; the hub cannot be asked now"):
        chosen_prompts("hub:me/plain:train", None)
    with pytest.raises(RainError, match="nothing of this data set was fetched before"):
        chosen_prompts("hub:me/rules", None)
    assert served.log


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hub:me/none", "shows no such data set or revision"),
        ("hub:plain", "is not a data set of the hub; expected hub:OWNER/NAME"),
        ("hub:me/a..b", "is not a data set of the hub; expected hub:OWNER/NAME"),
        ("hub:me/plain:dev", "has no split 'dev', but test, train"),
        ("hub:me/plain::text", "has no column 'text', but answer, question"),
        ("hub:me/tables", "has several configurations (main, other)"),
        ("hub:me/tables/mine", "has no configuration 'mine', but main, other"),
        ("hub:me/plain/main", "has no file in main that is read here"),
    ],
)
def test_what_cannot_be_found_is_said(served: Hub, tmp_path: Path, name: str, words: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    command = ("ask", "m", "--server", "http://127.0.0.1:9", "-o", place / "a.jsonl")
    assert words in refused(place, *command, "--prompts", name)
    assert served.address


def test_columns_that_hold_no_prompt(served: Hub) -> None:
    place = served.repositories["datasets/me/plain"] / "test.jsonl"
    place.write_text(lines([{"text": "Hello?"}]))
    with pytest.raises(RainError, match=r"test.jsonl:1: has none of the columns prompt, .*text"):
        chosen_prompts("hub:me/plain", None)
    assert [one.text for one in chosen_prompts("hub:me/plain:test:text", None)] == ["Hello?"]


def test_parquet_without_its_library(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RainError, match=r"pip install 'rain-mergekit\[parquet\]'"):
        chosen_prompts("hub:me/tables/main", None)
    assert served.log


def test_a_broken_table(served: Hub) -> None:
    (served.repositories["datasets/me/tables"] / "other" / "all.parquet").write_bytes(b"PAR1")
    outcome = run("ask", "m", "--server", "http://x/v1", "--prompts", "hub:me/tables/other")
    assert outcome.code == 1
    assert "cannot be read as parquet" in outcome.output


# Layouts of published sets: their files, the `configs` of their card, what is asked for


def configs(*rows: str) -> str:
    return "---\nconfigs:\n" + "".join(f"- {row}\n" for row in rows) + "---\n"


@pytest.mark.parametrize(
    ("files", "card", "name", "expected"),
    [
        (["README.md", "ifeval_input_data.jsonl"], "", "", ["ifeval_input_data.jsonl"]),
        (["README.md", "eval.yaml", "test.jsonl"], "no card", "", ["test.jsonl"]),
        (["data/train-00000-of-00001.parquet"], "", "", ["data/train-00000-of-00001.parquet"]),
        (["train.jsonl", "dev.jsonl"], "", "", ["dev.jsonl"]),
        (["train.jsonl", "dev.jsonl"], "", ":train", ["train.jsonl"]),
        (["test.jsonl", "test.parquet"], "", ":test", ["test.jsonl"]),
        (["data/hard-00000-of-00001.parquet"], "", "", ["data/hard-00000-of-00001.parquet"]),
        (["b.json", "a.json"], "", "", ["a.json", "b.json"]),
        (
            ["main/test/0000.parquet", "main/train/0000.parquet", "socratic/test/0000.parquet"],
            "",
            "/main@refs/convert/parquet",
            ["main/test/0000.parquet"],
        ),
        (
            ["one.jsonl", "two.jsonl"],
            configs(
                "{config_name: I, data_files: one.jsonl}",
                "{config_name: II, data_files: [two.jsonl]}",
            ),
            "/II",
            ["two.jsonl"],
        ),
        (
            ["a/x.jsonl", "b/x.jsonl"],
            configs(
                "{config_name: a, data_dir: a}",
                "{config_name: b, data_dir: b, default: true}",
            ),
            "",
            ["b/x.jsonl"],
        ),
        (
            ["x.jsonl", "data/y.jsonl"],
            configs("{config_name: a, data_files: {hard: '**/y.jsonl', easy: ./x.jsonl}}"),
            ":easy",
            ["x.jsonl"],
        ),
        (["test.jsonl"], "---\nconfigs: [\n---\n", "", ["test.jsonl"]),
        (["test.jsonl"], "---\nlicense: mit\n---\n", "", ["test.jsonl"]),
    ],
)  # fmt: skip
def test_files_of_a_split(files: list[str], card: str, name: str, expected: list[str]) -> None:
    assert chosen_files(files, card, HubSet.parse(f"hub:me/set{name}")) == expected


def test_several_splits_of_which_none_is_usual() -> None:
    files = [f"data/{name}-00000-of-00001.parquet" for name in ("easy", "hard")]
    with pytest.raises(RainError, match=r"several splits \(easy, hard\)"):
        chosen_files(files, "", HubSet.parse("hub:me/set"))


def test_names_are_taken_apart() -> None:
    found = HubSet.parse("hub:me/set/main@refs/pr/1:test:question")
    assert found == HubSet("me/set", "main", "refs/pr/1", "test", "question")
    assert HubSet.parse("hub:me/set") == HubSet("me/set")
    assert HubSet.parse("hub:me/set::q") == HubSet("me/set", column="q")
