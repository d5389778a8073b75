"""Do the recipes of docs/evaluation.md work with the harnesses that are installed?

    pip install 'lm-eval[hf]' .
    python -m benchmarks.harnesses lm_eval

The task file and the command are taken from the page and run on the packaged reasoning model, once
as they stand and once with the thinking left in the answers. Exit status 1 unless only the first
finds the answers. No network is needed. `lighteval` in the place of `lm_eval`, in an environment of
its own, does the same with that one.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TRIO = Path(__file__).parents[1] / "rain_mergekit" / "trio"
PAGE = Path(__file__).parents[1] / "docs" / "evaluation.md"
PROMPTS = 32


@dataclass(frozen=True)
class Harness:
    """How one of them is run.

    start: of the command on the page. task: start and name of its task file. spoil: the command
    that scores the thinking too. out: its option for a folder. metric: its name of exact match.
    """

    start: str
    task: tuple[str, str]
    spoil: Callable[[str], str]
    out: str
    metric: tuple[str, str]


HARNESSES = {
    "lm_eval": Harness(
        "lm_eval run",
        ("task: plain", "plain.yaml"),
        lambda line: re.sub(r',think_end_token="[^"]*"', "", line),
        "--output_path",
        ("plain", "exact_match,none"),
    ),
    "lighteval": Harness(
        "lighteval accelerate",
        ("from lighteval", "plain.py"),
        lambda line: f"{line} --no-remove-reasoning-tags",
        "--output-dir",
        ("plain|0", "em"),
    ),
}


def fenced(start: str) -> str:
    """The one block of the page that starts with this."""
    blocks = re.findall(r"(?ms)^```\w*\n(.*?)^```$", PAGE.read_text(encoding="utf-8"))
    (found,) = [block for block in blocks if block.startswith(start) and "ifeval" not in block]
    return str(found)


def command(harness: Harness) -> str:
    """The one that runs the task file, on one line; MODEL is a folder `model` beside it."""
    return fenced(harness.start).replace("\\\n", " ").strip().replace("=MODEL", "=./model")


def prepare(folder: Path, harness: Harness) -> None:
    """The task file, and prompts of the packaged models without a constraint."""
    start, name = harness.task
    (folder / name).write_text(fenced(start), encoding="utf-8")
    lines = (TRIO / "test.jsonl").read_text(encoding="utf-8").splitlines()
    plain = [one for one in map(json.loads, lines) if not one["constraint"]][:PROMPTS]
    rows = ({"prompt": one["prompt"], "expected": one["expected_response"]} for one in plain)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "prompts").mkdir()
    for path in ("plain.jsonl", "prompts/test.jsonl"):
        (folder / path).write_text(text, encoding="utf-8")


def exact_match(folder: Path, line: str, harness: Harness, out: str) -> float:
    """What the harness says after that command, of a fresh copy of the model."""
    shutil.rmtree(folder / "model", ignore_errors=True)
    shutil.copytree(TRIO / "reasoning", folder / "model")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    words = [*shlex.split(line, posix=True), harness.out, out]
    subprocess.run(words, cwd=folder, env=environment, check=True)
    (result,) = (folder / out).rglob("results*.json")
    task, metric = harness.metric
    return float(json.loads(result.read_text(encoding="utf-8"))["results"][task][metric])


def main() -> None:
    """Run the command in both ways; one line says what each finds."""
    harness = HARNESSES[sys.argv[1]]
    line = command(harness)
    with tempfile.TemporaryDirectory(prefix="rain-harness-") as name:
        folder = Path(name)
        prepare(folder, harness)
        right = exact_match(folder, line, harness, "with")
        spoilt = exact_match(folder, harness.spoil(line), harness, "without")
    print(f"exact match: {right:.2f} as on the page, {spoilt:.2f} with the thinking left in")
    sys.exit(not (right > 0.5 and spoilt == 0.0))


if __name__ == "__main__":
    main()
