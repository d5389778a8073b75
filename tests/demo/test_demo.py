"""The demo, once as a whole and without a network, and the parts of it that can go wrong."""

from __future__ import annotations

import json
import os
import resource
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import environments
import pytest
import yaml
from commands import Outcome, everything, refused, run_process, succeed
from mergekit.config import MergeConfiguration
from watching import untouched

from rain_mergekit.config.merge_config import read_config
from rain_mergekit.demo.files import ASKED, CALIBRATIONS, MERGES, claim, configurations
from rain_mergekit.demo.scoring import Record, is_correct, is_followed, read_records, score
from rain_mergekit.system.shipped_files import TRIO
from rain_mergekit.text.thinking_blocks import Thought

RAIN, PROJECTION, STRONGER = "rain", "rain, projection 1.0", "rain, projection 1.2"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome, float]:
    """One run, where auto-loading is off and the folder has an awkward name and a user's file."""
    folder = tmp_path_factory.mktemp("demo") / "rain demo: +é"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    environment = {**os.environ, "RAIN_MERGEKIT_AUTOLOAD": "0"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with untouched(TRIO):
        outcome = run_process("demo", folder, env=environment, cwd=folder.parent)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return folder, outcome, seconds


def numbers(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "demo.json").read_text())["models"]
    return content


def test_demo_reaches_what_it_promises(done: tuple[Path, Outcome, float]) -> None:
    folder, outcome, seconds = done
    assert outcome.code == 0, outcome.output
    found = numbers(folder)
    for label, both in ((RAIN, 68), (PROJECTION, 55), (STRONGER, 63)):
        assert found[label]["complete"] == 100
        assert found[label]["plain"] >= 97
        assert found[label]["both"] >= both
        assert found[label]["drift"]["think"]["mean"] < 0.01
    assert seconds < 600  # of one core; 120 where it was written


def test_demo_shows_why(done: tuple[Path, Outcome, float]) -> None:
    found = numbers(done[0])
    assert found["reasoning model"]["complete"] == 100
    assert found["reasoning model"]["both"] < 30
    assert found["reasoning model"]["drift"]["think"]["mean"] == 0
    assert found["instruct model"]["complete"] == 0
    for name, row in found.items():
        if name.startswith("task_arithmetic"):
            assert row["both"] < found[STRONGER]["both"]
            assert row["plain"] < 80
            for label in (RAIN, PROJECTION, STRONGER):
                assert row["drift"]["think"]["mean"] > 20 * found[label]["drift"]["think"]["mean"]


def test_demo_prints_a_table_examples_and_what_is_next(done: tuple[Path, Outcome, float]) -> None:
    folder, outcome, _ = done
    for label in (*numbers(folder), "L_think", "capitals only .", "Next", "mergekit-rain verify"):
        assert label in outcome.stdout
    assert "\x1b[" not in outcome.output
    assert outcome.output == outcome.stdout  # not a word of warning
    assert outcome.stdout.isascii() == str(folder).isascii()


def test_demo_leaves_what_it_says_and_nothing_else(done: tuple[Path, Outcome, float]) -> None:
    folder = done[0]
    assert (folder / "notes.txt").read_text() == "mine"
    expected = {"notes.txt", "demo.json", "held-out.jsonl", *CALIBRATIONS.values()}
    expected |= {*MERGES, *(f"{name}.yml" for name in MERGES)}
    assert {path.name for path in folder.iterdir()} == expected
    for name in MERGES:
        assert (folder / name / "model.safetensors").exists()
        assert (folder / name / "mergekit_config.yml").read_text() == (
            folder / f"{name}.yml"
        ).read_text()


def test_next_steps_work(done: tuple[Path, Outcome, float], tmp_path: Path) -> None:
    folder = done[0]
    options = ("--against", TRIO / "reasoning", "--reasoning-data", folder / "held-out.jsonl")
    said = succeed("verify", folder / "rain", *options, "--samples", 20)
    assert "the thinking format is kept" in said
    assert "up to date" in succeed("merge", folder / "rain.yml", tmp_path / "other")
    one = (tmp_path / "other" / "model.safetensors").read_bytes()
    assert one == (folder / "rain" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_numbers_for_programs(done: tuple[Path, Outcome, float]) -> None:
    """Once more in the same folder; nothing but one object on stdout."""
    outcome = run_process("demo", done[0], "--json", cwd=done[0].parent)
    assert outcome.code == 0, outcome.output
    found = json.loads(outcome.stdout)
    assert found.pop("format") == "mergekit-rain demo"
    assert found.pop("version") == 1
    assert found.pop("folder") == str(done[0])
    assert {"created_by": "mergekit-rain demo", **found} == json.loads(
        (done[0] / "demo.json").read_text()
    )
    assert set(found) == {"seconds", "models"}
    assert {"complete", "plain", "correct", "followed", "both", "drift"} == set(
        found["models"][RAIN]
    )


# Other people's files


@pytest.mark.parametrize(
    "name", ["demo.json", "rain.yml", "rain/x.txt", "projection.rain.safetensors"]
)
def test_files_of_a_user_are_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = everything(tmp_path)
    message = refused(tmp_path, "demo", tmp_path)
    assert f"{tmp_path}: {name.partition('/')[0]} there would be overwritten" in message
    assert everything(tmp_path) == before


def test_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(tmp_path, "demo", tmp_path / "file" / "demo")


def test_a_second_demo_may_replace_the_first_but_not_what_was_changed(tmp_path: Path) -> None:
    claim(tmp_path)
    (tmp_path / "rain").mkdir()
    assert claim(tmp_path) == configurations(tmp_path)
    mine = tmp_path / "projection.yml"
    changed = mine.read_text().replace("lambda: 1.0", "lambda: 1.5")
    mine.write_text(changed)
    assert "projection.yml there would be overwritten" in refused(tmp_path, "demo", tmp_path)
    assert mine.read_text() == changed


def test_configurations_say_what_they_mean(tmp_path: Path) -> None:
    texts = claim(tmp_path)
    assert read_config(tmp_path / "rain.yml").settings.fit == "streams"
    assert [Path(m["model"]).name for m in yaml.safe_load(texts["rain.yml"])["models"]] == [
        "instruct"
    ]
    parsed = read_config(tmp_path / "projection.yml")
    assert parsed.settings.fit == "projection"
    assert parsed.calibration == tmp_path / "projection.rain.safetensors"
    assert {r: Path(m.model.path).name for r, m in parsed.models.items()} == {
        role: role for role in ("reasoning", "instruct", "pretrained")
    }
    weights = {}
    for name in ("task-arithmetic", "task-arithmetic-0.7", "task-arithmetic-linear-0.8"):
        merge = MergeConfiguration.model_validate(yaml.safe_load(texts[f"{name}.yml"]))
        weights[name] = [model.parameters["weight"] for model in merge.models]
    assert weights["task-arithmetic"] == [1.0, -1.0]
    assert weights["task-arithmetic-0.7"] == [0.7, -0.7]
    values = [entries[0].value for entries in weights["task-arithmetic-linear-0.8"]]
    assert values == [0.8, -0.8]
    strengths = [
        yaml.safe_load(texts[f"{name}.yml"])["parameters"]
        for name in ("projection", "projection-1.2")
    ]
    assert [one["lambda"] for one in strengths] == [1.0, 1.2]
    assert strengths[0]["calibration"] == strengths[1]["calibration"]


def test_the_trio_is_in_the_wheel(tmp_path: Path) -> None:
    with zipfile.ZipFile(environments.build_wheel(tmp_path)) as wheel:
        packed = {name.removeprefix("rain_mergekit/") for name in wheel.namelist()}
    files = [p for p in TRIO.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert len(files) > 20
    assert {f"trio/{path.relative_to(TRIO).as_posix()}" for path in files} <= packed


# Judging answers

FORMATS = {"upper": "upper", "brackets": "enclose", "end": "end", "begin": "begin"}
FORMATS |= {"twice": "twice", "separate": "separate"}
PARAMETERS = {"brackets": "[ ]", "end": "moon", "begin": "cloud", "separate": "-"}


def record(constraint: str | None, expected: str = "answer : two hats") -> Record:
    shape = FORMATS.get(constraint or "")
    parameter = PARAMETERS.get(constraint or "", "")
    words = ("two", "hats")
    return Record("?", words, constraint, shape, parameter, "a is b .", "answer :", expected)


@pytest.mark.parametrize(
    ("constraint", "response", "correct", "followed"),
    [
        (None, "answer : two hats", True, False),
        (None, "answer : one hats", False, False),
        (None, "two hats", False, False),
        (None, "", False, False),
        ("upper", "answer : TWO HATS", True, True),
        ("upper", "answer : two hats", True, False),
        ("upper", "answer : SIX HATS", False, True),
        ("brackets", "answer : [ two hats ]", True, True),
        ("brackets", "answer : [ two hats", True, False),
        ("end", "answer : two hats moon", True, True),
        ("end", "answer : two hats bye", True, False),
        ("begin", "answer : cloud two hats", True, True),
        ("begin", "answer : two hats cloud", True, False),
        ("twice", "answer : two hats two hats", True, True),
        ("twice", "answer : two hats one hats", False, False),
        ("separate", "answer : two - hats", True, True),
        ("separate", "answer : two hats", True, False),
        ("separate", "answer :", False, False),
    ],
)
def test_rules(constraint: str | None, response: str, correct: bool, followed: bool) -> None:
    assert is_correct(record(constraint), response) == correct
    assert is_followed(record(constraint), response) == followed


def test_percentages() -> None:
    texts = ["answer : TWO HATS", "answer : two hats", "answer : two hats", ""]
    thoughts = [Thought(bool(text), bool(text), text, text) for text in texts]
    upper = record("upper", "answer : TWO HATS")
    found = score([upper, upper, record(None), record(None)], thoughts)
    assert (found.complete, found.plain) == (75.0, 50.0)
    assert (found.correct, found.followed, found.both) == (100.0, 50.0, 50.0)


def test_expected_responses_are_right_by_the_rules() -> None:
    for found in read_records(TRIO / "test.jsonl"):
        assert is_correct(found, found.expected)
        assert is_followed(found, found.expected) == (found.constraint is not None)


def test_prompts_are_held_out_and_of_every_kind() -> None:
    asked = read_records(TRIO / "test.jsonl", ASKED)
    kinds = Counter(one.constraint for one in asked)
    assert kinds.pop(None) == ASKED // 2
    assert len(kinds) == 7
    assert sum(kinds.values()) == ASKED
    assert min(kinds.values()) > ASKED // 10
    used = set()
    for name in ("reasoning", "instruction"):
        lines = (TRIO / f"{name}.jsonl").read_text().splitlines()
        used |= {json.loads(line)["prompt"] for line in lines}
    assert not used & {one.prompt for one in asked}
