"""Shell completion, and that warnings are said once."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import commands
import pytest
from commands import MAIN
from doc_blocks import ROOT, blocks
from hangs import HANGS

from rain_mergekit.commands.console import Console

# As the console script; says at the end whether anything heavy was loaded.
LIGHT = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {MAIN}"


def complete(shell: str, *words: str, place: int, script: str = MAIN) -> list[str]:
    """What the shell would be told at that place of the line."""
    environment = {
        **os.environ,
        "_MERGEKIT_RAIN_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(place),
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
        timeout=HANGS,
    )
    return done.stdout.splitlines()


def test_commands_complete_without_loading_them() -> None:
    *found, heavy = complete("bash", "mergekit-rain", "", place=1, script=LIGHT)
    assert heavy == "False"
    assert {"plain,calibrate", "plain,merge", "plain,data", "plain,demo"} <= set(found)
    assert complete("bash", "mergekit-rain", "ca", place=1) == ["plain,calibrate", "plain,card"]


def test_options_and_inner_commands_complete() -> None:
    assert "plain,--temperature" in complete(
        "bash", "mergekit-rain", "data", "reasoning", "--t", place=3
    )
    found = complete("zsh", "mergekit-rain", "data", "", place=2)
    assert found[::3] == ["plain"] * 3
    assert found[1::3] == ["check", "instruction", "reasoning"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_script_is_the_documented_one(shell: str) -> None:
    """The line of the page gives a script; bash itself is asked whether it is one."""
    text = "".join(block.text for block in blocks(ROOT / "docs" / "command-line.md"))
    assert f"_MERGEKIT_RAIN_COMPLETE={shell}_source mergekit-rain" in text
    done = subprocess.run(
        [sys.executable, "-c", MAIN],
        capture_output=True,
        text=True,
        env={**os.environ, "_MERGEKIT_RAIN_COMPLETE": f"{shell}_source"},
        check=True,
        timeout=HANGS,
    )
    assert f"_MERGEKIT_RAIN_COMPLETE={shell}_complete" in done.stdout
    if shell == "bash":
        program = shutil.which("bash")
        assert program is not None
        subprocess.run([program, "-n"], input=done.stdout, text=True, check=True)
        assert re.search(r"complete .*mergekit-rain", done.stdout)


def test_exit_codes_are_documented_alike() -> None:
    """The page, the group's help and the troubleshooting page name the same codes."""
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| (\d+) \|", page, re.MULTILINE))
    source = Path(commands.TRIO.parent, "cli.py").read_text(encoding="utf-8")
    assert listed == {"0", "1", "2", "3", "4", "130", "143"}
    assert all(re.search(rf"\b{code} \w", source) for code in listed)


def test_warning_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    for text in ("one", "two", "one"):
        console.warn(text)
    assert capsys.readouterr().err == "Warning: one\nWarning: two\n"
