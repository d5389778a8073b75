"""Do the recipes of docs/evaluation.md work with the harness that is installed?

    pip install 'lm-eval[hf]' .
    python -m benchmarks.harnesses

The task file and the command are taken from the page and run on the packaged reasoning model, once
as they stand and once without `think_end_token`. Exit status 1 unless only the first finds the
answers. No network is needed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rain_mergekit.system.shipped_files import TRIO

PAGE = Path(__file__).parents[1] / "docs" / "evaluation.md"
MARKER = re.compile(r',think_end_token="[^"]*"')
PROMPTS = 32


def fenced(start: str) -> str:
    """The one block of the page that starts with this."""
    blocks = re.findall(r"(?ms)^```\w*\n(.*?)^```$", PAGE.read_text(encoding="utf-8"))
    (found,) = [block for block in blocks if block.startswith(start) and "ifeval" not in block]
    return str(found)


def command() -> str:
    """The one that runs the task file, on one line."""
    text = fenced("lm_eval run").replace("\\\n", " ")
    return text.strip().replace("pretrained=MODEL", f"pretrained={TRIO / 'reasoning'}")


def prepare(folder: Path) -> None:
    """The task file, and prompts of the packaged models without a constraint."""
    (folder / "plain.yaml").write_text(fenced("task: plain"), encoding="utf-8")
    lines = (TRIO / "test.jsonl").read_text(encoding="utf-8").splitlines()
    plain = [one for one in map(json.loads, lines) if not one["constraint"]][:PROMPTS]
    rows = ({"prompt": one["prompt"], "expected": one["expected_response"]} for one in plain)
    (folder / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def exact_match(folder: Path, line: str, out: str) -> float:
    """What the harness says after that command."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    words = [*shlex.split(line, posix=True), "--output_path", out]
    subprocess.run(words, cwd=folder, env=environment, check=True)
    (result,) = (folder / out).rglob("results*.json")
    found = json.loads(result.read_text(encoding="utf-8"))["results"]["plain"]
    return float(found["exact_match,none"])


def main() -> None:
    """Run the command in both ways; one line says what each finds."""
    line = command()
    assert MARKER.search(line), line
    with tempfile.TemporaryDirectory(prefix="rain-harness-") as name:
        folder = Path(name)
        prepare(folder)
        right = exact_match(folder, line, "with")
        spoilt = exact_match(folder, MARKER.sub("", line), "without")
    print(f"exact match: {right:.2f} with think_end_token, {spoilt:.2f} without")
    sys.exit(not (right > 0.5 and spoilt == 0.0))


if __name__ == "__main__":
    main()
