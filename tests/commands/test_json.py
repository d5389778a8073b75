"""`--json`: every command has it, and prints the fields that docs/command-line.md lists."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from commands import TRIO, Workplace, make_models, make_workplace, run
from quantised import FP8_SECTION, fp8_blocks, quantise

from rain_mergekit.cli import cli

PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"
# Fields of an object inside the object, in the row of their command.
INSIDE = ("calibration", "plan")


def documented() -> dict[str, set[str]]:
    """The words of each command's row."""
    table = PAGE.read_text(encoding="utf-8").partition("## For programs")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w -]+)` \| (.*) \|$", table, re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", text)) for name, text in rows}


def commands(group: click.Group, before: str = "") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, f"{before}{name} ")
        elif command is not None:
            yield f"{before}{name}", command


def test_every_command_has_it_and_a_row() -> None:
    able = {
        name
        for name, command in commands(cli)
        if any("--json" in option.opts for option in command.params)
    }
    assert able == {name for name, _ in commands(cli)} == set(documented())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("json")
    found = make_workplace(folder / "place", make_models(folder / "models"), samples=4)
    found.write(rain={"fit": "streams", "stream_start": 0.0})  # for the adapter
    return found


def printed(name: str, *arguments: object, code: int = 0) -> dict[str, Any]:
    """What a command prints: one object, with the fields of its row and no others."""
    outcome = run(*name.split(), *arguments, "--json")
    assert outcome.code == code, outcome.output
    found: dict[str, Any] = json.loads(outcome.stdout)
    assert found.pop("format") == f"mergekit-rain {name}"
    assert found.pop("version") == 1
    keys = set(found)
    for inner in INSIDE:
        if isinstance(found.get(inner), Mapping):
            keys |= set(found[inner])
    assert keys <= documented()[name]
    return found


def test_objects_have_the_fields_that_are_documented(place: Workplace) -> None:
    """One after the other: each needs what those before it have made."""
    folder, config = place.folder, place.yaml
    merged = folder / "merged"
    plan = printed("calibrate", config, "--plan")["plan"]
    assert plan["peak"] == sum(plan["memory"].values())
    made = printed("calibrate", config)["calibration"]
    assert made["file"] == str(place.calibration)
    assert made["samples"]["reasoning"]["used"] == 4
    seen = printed("merge", config, merged)
    assert seen == {"folder": str(merged), "calibration": str(place.calibration)}
    assert printed("finish", merged) == {"folder": str(merged), "changed": False}
    assert printed("card", merged) == {"file": f"{merged}/README.md", "changed": False}
    assert printed("export-lora", place.calibration, folder / "lora")["ranks"]
    data = printed("data check", folder / "reasoning.jsonl", "--model", place.model("reasoning"))
    assert (data["kind"], data["used"], data["length"]["unit"]) == ("reasoning", 4, "tokens")
    assert printed("examples", folder / "examples")["folders"] == ["configs", "calibration", "trio"]
    equal = printed("diff", place.model("reasoning"), place.model("reasoning"))
    assert equal["equal"] == len(equal["tensors"])
    quantise(shutil.copytree(merged, folder / "fp8"), FP8_SECTION, fp8_blocks)
    plain = printed("dequantize", folder / "fp8", folder / "plain")
    assert (plain["dequantised"], plain["files"]) == (7, 1)
    files = printed("push", merged, "me/it", "--dry-run")
    assert files["url"] is None
    assert files["files"]["README.md"] > 0


def test_page_and_set_for_programs(place: Workplace, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = run("calibrate", place.yaml)
    assert made.code == 0, made.output
    page = tmp_path / "page.html"
    assert printed("report", place.calibration, "-o", page, "--no-task-vectors")["file"] == str(
        page
    )
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join((TRIO / "test.jsonl").read_text().splitlines(keepends=True)[:4]))
    how = ("--model", TRIO / "reasoning", "--max-new-tokens", 96, "-o", tmp_path / "set.jsonl")
    found = printed("data reasoning", "--prompts", prompts, *how)
    assert found["samples"] == found["usable"] == found["answers"] == 4


def test_nobody_can_be_asked(tmp_path: Path) -> None:
    outcome = run("auto", "a", "b", "-o", tmp_path / "out", "--json")
    assert outcome.code == 2
    assert "--json needs -y" in outcome.output
