"""`compare` on the answers of one merge at several strengths."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import refused, run, succeed
from scripted_server import serving

from rain_mergekit.evaluation.divergence import Drift, Place
from rain_mergekit.evaluation.strengths import pareto
from rain_mergekit.evaluation.sweep import Row, write_rows

# What a strength does: of ten prompts so many are right, and so many as asked.
DOES = {0.0: (10, 0), 0.5: (10, 6), 1.0: (9, 6), 1.5: (2, 9)}
L_THINK = {0.0: 0.0, 0.5: 0.001, 1.0: 0.004, 1.5: 0.2}


def writes(right: int, followed: int) -> Callable[[str], str]:
    def reply(prompt: str) -> str:
        number = int(prompt.split(maxsplit=1)[0])
        answer = number + 1 if number < right else 99
        return f"<think>\nOne more.\n</think>\n\n{'So: ' * (number < followed)}{answer}"

    return reply


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strengths")
    rule = {"instruction_id_list": ["start:phrase"], "kwargs": [{"phrase": "So:"}]}
    rows = [{"prompt": f"{i} + 1 ?", "answer": i + 1, **rule} for i in range(10)]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for strength, (right, followed) in {**DOES, -1.0: (10, 0)}.items():
        name = "reasoning" if strength < 0 else f"lambda-{strength}"
        with serving(writes(right, followed)) as server:
            how = ("--server", server.url, "--prompts", prompts)
            succeed("ask", "m", *how, "-o", folder / f"{name}.jsonl")
    drifts = {s: Drift(Place(v, 9), Place(v, 9), Place(v, 9), 9, "", v) for s, v in L_THINK.items()}
    write_rows(folder / "sweep", [Row(s, f"lambda-{s}", drift) for s, drift in drifts.items()])
    return folder


def files(place: Path) -> list[Path]:
    return [place / "reasoning.jsonl", *(place / f"lambda-{s}.jsonl" for s in sorted(DOES)[::-1])]


def test_table_and_marks(place: Path) -> None:
    """1.0 follows no more than 0.5 at a higher L_think; 1.5 follows more, whatever it costs."""
    said = succeed("compare", *files(place), "--sweep", place / "sweep", "--examples", 0)
    lines = [line.split() for line in said.splitlines()]
    at = lines.index(["lambda", "L_think", "whole", "correct", "followed", "both", "tokens"])
    assert [line[:6] for line in lines[at + 1 : at + 5]] == [
        ["0", "0", "100.0", "100.0", "0.0", "0.0"],
        ["0.5", "0.001", "100.0", "100.0", "60.0", "60.0"],
        ["1", "0.004", "100.0", "90.0", "60.0", "60.0"],
        ["1.5", "0.2", "100.0", "20.0", "90.0", "20.0"],
    ]
    found = json.loads(
        run("compare", *files(place), "--sweep", place / "sweep/sweep.json", "--json").stdout
    )
    assert [(one["lambda"], one["l_think"], one["best"]) for one in found["strengths"]] == [
        (0.0, 0.0, True),
        (0.5, 0.001, True),
        (1.0, 0.004, False),
        (1.5, 0.2, False),  # right and as asked is what counts
    ]


def test_page_has_curves(place: Path) -> None:
    pytest.importorskip("matplotlib")
    page, plain = place / "page.html", place / "plain.html"
    succeed("compare", *files(place), "--sweep", place / "sweep", "--html", page)
    succeed("compare", *files(place)[:2], "--html", plain)
    text = page.read_text(encoding="utf-8")
    assert "Over lambda" in text
    assert "by L_think" in text
    assert "Over lambda" not in plain.read_text(encoding="utf-8")


def test_without_a_sweep_tokens_are_the_cost(place: Path) -> None:
    found = json.loads(run("compare", *files(place), "--json").stdout)
    assert all(one["l_think"] is None for one in found["strengths"])
    assert any(one["best"] for one in found["strengths"])


def test_sweeps_that_cannot_be_used(place: Path, tmp_path: Path) -> None:
    own = place / "reasoning.jsonl"
    assert run("compare", own, own, "--sweep", place / "sweep").code == 2
    other = tmp_path / "sweep.json"
    other.write_text('{"rows": []}')
    assert "is not a table of" in refused(tmp_path, "compare", *files(place), "--sweep", tmp_path)
    other.write_text('{"created_by": "mergekit-rain sweep", "rows": [{"strength": 1}]}')
    assert "is damaged" in refused(tmp_path, "compare", *files(place), "--sweep", other)


def test_the_line_holds_what_nothing_beats() -> None:
    """Against every pair compared."""
    for drawn in torch.randint(6, (50, 8, 2)).tolist():
        points = [(x, y) for x, y in drawn]
        kept = {
            p for p in points
            if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)
        }  # fmt: skip
        line = pareto([(float(x), float(y)) for x, y in points], less=True)
        assert {(int(x), int(y)) for x, y in line} == kept
        assert all(a < b for a, b in itertools.pairwise(line))
