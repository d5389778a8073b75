"""`compare` on the answers of one merge at several strengths."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import browser
import pytest
import torch
from commands import TRIO, refused, run, succeed
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
    browser.check([text, plain.read_text(encoding="utf-8")], place / "browser")


def test_without_a_sweep_tokens_are_the_cost(place: Path) -> None:
    found = json.loads(run("compare", *files(place), "--json").stdout)
    assert all(one["l_think"] is None for one in found["strengths"])
    assert any(one["best"] for one in found["strengths"])


def test_l_think_of_what_verify_has_printed(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    texts = ("--reasoning-data", TRIO / "reasoning.jsonl", "--samples", 2)
    outcome = run("verify", TRIO / "pretrained", "--against", TRIO / "reasoning", *texts, "--json")
    printed = tmp_path / "verify.json"
    printed.write_text(outcome.stdout)
    l_think = json.loads(outcome.stdout)["divergence"]["drift"]["think"]["mean"]
    assert l_think > 0.01
    command = ("compare", *files(place)[::3], "--verified", f"lambda-0.5={printed}")
    found = json.loads(run(*command, "--json").stdout)
    assert [one["l_think"] for one in found["models"]] == [None, l_think]
    page = tmp_path / "page.html"
    said = succeed(*command, "--html", page)
    assert re.search(rf"^L_think +- +{l_think:.3g}$", said, re.MULTILINE)
    assert "Followed, percent, by L_think" in page.read_text(encoding="utf-8")
    printed.write_text('{"divergence": null}')
    assert "holds no L_think" in refused(place, *command)
    assert run(*command[:-1], f"other={printed}").code == 2
    assert run(*command[:-1], "lambda-0.5").code == 2


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
