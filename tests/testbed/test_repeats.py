"""The table of models that were judged twice: counted by hand, and only if they are the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from testbed.judging.intervals import packed
from testbed.language import repeats

NAME = repeats.DEFAULTS


def board(folder: Path, both: range, right: range, **key: Any) -> None:
    """256 prompts: 64 with known wordings, 64 with held-out ones, 128 without a constraint."""
    bits = {
        kind: packed([index in places for index in range(256)])
        for kind, places in (("both", both), ("right", right))
    }
    row: Mapping[str, Any] = {
        "name": NAME,
        "key": {"models": "a", "prompts": "b", **key},
        "bits": bits,
        "numbers": {name: {"value": 0.001} for name in ("L_think", "both", "plain_right")},
    }
    folder.mkdir()
    (folder / "row.json").write_text(json.dumps(row))


def test_shares_and_differences_are_those_of_the_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, "SAME", (("trio-one", "trio-two", NAME, "7"),))
    board(tmp_path / "trio-one", both=range(32, 64), right=range(128, 192))
    board(tmp_path / "trio-two", both=range(32, 128), right=range(256))
    line = repeats.repeats(tmp_path).splitlines()[-1]
    name, changed, both, held_out, plain, moved = (one.strip() for one in line.split("|")[1:-1])
    assert (name, changed, moved) == ("one → two", "7", "0.001 → 0.001")
    assert both == "25 → 75, +50 [+50, +50]"  # in each half of the prompts all or nothing changes
    assert held_out == "0 → 100, +100 [+100, +100]"
    assert plain.startswith("50 → 100, +50 [+4")


@pytest.mark.parametrize("other", [{"models": "c"}, {"prompts": "c"}])
def test_other_models_or_prompts_are_no_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: Mapping[str, str]
) -> None:
    monkeypatch.setattr(repeats, "SAME", (("trio-one", "trio-two", NAME, "7"),))
    board(tmp_path / "trio-one", both=range(1), right=range(1))
    board(tmp_path / "trio-two", both=range(1), right=range(1), **other)
    with pytest.raises(ValueError, match=f"other {next(iter(other))}"):
        repeats.repeats(tmp_path)
