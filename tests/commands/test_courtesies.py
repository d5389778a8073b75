"""Small courtesies: what somebody may have meant, plural forms, lines that fit."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest
from commands import run
from tiny import Tiny

from rain_mergekit.commands.console import fitted
from rain_mergekit.system.wording import counted, did_you_mean


@pytest.mark.parametrize(
    ("typed", "meant"), [("calibrat", "calibrate"), ("varify", "verify"), ("Merge", "merge")]
)
def test_commands_are_guessed(typed: str, meant: str) -> None:
    outcome = run(typed)
    assert outcome.code == 2
    assert f"No such command {typed!r}, did you mean {meant!r}?" in outcome.output


def test_commands_that_nobody_can_guess_are_listed() -> None:
    assert "; there are auto, " in " ".join(run("zzz").output.split())


def test_words() -> None:
    assert [counted(n, "layer") for n in (0, 1, 2)] == ["0 layers", "1 layer", "2 layers"]
    assert counted(2, "match", "matches") == "2 matches"
    assert did_you_mean("lamda", ["calibration", "lambda"]) == ", did you mean 'lambda'?"
    assert did_you_mean("zzz", ["calibration", "lambda"]) == ""


def test_lines_fit_the_terminal() -> None:
    prose = "  changes of mean rank 8.0 for 28 weights; distance from the teachers: answers 22.4%"
    lines = fitted(prose, 40).split("\n")
    assert all(len(line) <= 40 for line in lines)
    assert all(line.startswith("  ") for line in lines)
    assert " ".join(" ".join(lines).split()) == " ".join(prose.split())
    assert fitted(prose, None) == prose  # a pipe
    command = "Next: mergekit-yaml config.yml ./a-folder-with-a-long-name/merged"
    assert fitted(command, 40) == command  # to be copied


AT_ONCE = """
import sys
from rain_mergekit.commands import starting
starting.PATIENCE = 0
from rain_mergekit.cli import main
sys.argv = ["mergekit-rain", *sys.argv[1:]]
main()
"""


def on_terminal(*argv: object) -> str:
    """All that a terminal is sent."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, "-c", AT_ONCE, *map(str, argv)]
    with subprocess.Popen(command, stdout=side, stderr=side, stdin=subprocess.DEVNULL):
        os.close(side)
        sent = b""
        with suppress(OSError):  # Linux says that the other side is gone by an error
            while part := os.read(main, 4096):
                sent += part
    os.close(main)
    return sent.decode()


def test_a_terminal_is_told_that_a_command_is_starting(tmp_path: Path) -> None:
    """Until the first line of the result, or of the error, and not where quiet was asked for."""
    tiny = Tiny.make(tmp_path, "llama")
    tiny.config()
    config = tiny.path.with_suffix(".yml")
    told = on_terminal("check", config)
    assert re.match(r"(\r  starting: [^\r]* \d+ s)+\r\x1b\[K[^\r\x1b]*\x1b\[1mmodels", told), told
    told = on_terminal("check", tmp_path / "none.yml")
    assert re.match(r"(\r  starting: [^\r]* \d+ s)+\r\x1b\[KError: ", told), told
    assert "starting" not in on_terminal("merge", tmp_path / "none.yml", tmp_path, "--quiet")


def test_a_bar_moves_while_a_plan_measures_the_machine(tmp_path: Path) -> None:
    """And is gone before the first line of the result."""
    tiny = Tiny.make(tmp_path, "llama")
    tiny.config()
    told = on_terminal("calibrate", tiny.path.with_suffix(".yml"), "--plan")
    before, _, after = told.partition("This calibration needs")
    assert after, told
    assert "planning" in before, told
    assert "planning" not in after
