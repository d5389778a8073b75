"""Show what makes a trio worth merging: task arithmetic helps constraints and harms thinking.

`python -m testbed.gap TRIO_DIR`
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from testbed.evaluate import evaluate
from testbed.models.loading import load_model, load_tokenizer
from testbed.puzzles.records import Record, read_lines

STRENGTHS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
SHARES = (
    "plain_accuracy",
    "constrained_accuracy",
    "followed",
    "both",
    "both_held_out",
    "no_close",
    "no_thinking",
)
CONTENT = ("thinking_right", "content_lost")
PLACES = ("L_think", "L_mid", "L_other")


@torch.inference_mode()
def add_task_vector(
    merged: PreTrainedModel,
    reasoning: PreTrainedModel,
    instruct: PreTrainedModel,
    base: PreTrainedModel,
    strength: float,
) -> None:
    """Set merged to θ_R + λ(θ_I - θ_B) for every tensor."""
    parts = zip(*(model.parameters() for model in (merged, reasoning, instruct, base)), strict=True)
    for target, start, tuned, origin in parts:
        target.copy_(start + strength * (tuned - origin))


def measure(
    trio: Path, prompts: Sequence[Record], strengths: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Numbers of the three models and of task arithmetic at each strength."""
    models = {role: load_model(trio / role) for role in ("reasoning", "instruct", "pretrained")}
    found = {role: evaluate(trio / role, trio / "reasoning", prompts) for role in models}
    merged, voice = load_model(trio / "reasoning"), load_tokenizer(trio / "reasoning")
    for strength in strengths:
        task_vector = models["instruct"], models["pretrained"]
        add_task_vector(merged, models["reasoning"], *task_vector, strength)
        with tempfile.TemporaryDirectory() as folder:
            merged.save_pretrained(folder)
            found[f"task arithmetic λ {strength}"] = evaluate(
                Path(folder), trio / "reasoning", prompts, voice
            )
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """The numbers as a Markdown table, shares in percent."""
    columns = (*SHARES, *CONTENT, *PLACES)
    lines = [
        f"| model | {' | '.join(columns).replace('_', ' ')} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, numbers in found.items():
        shares = [f"{100 * numbers[column]:.0f}" for column in (*SHARES, *CONTENT)]
        apart = [f"{numbers[column]:.4f}" for column in PLACES]
        lines.append(f"| {name} | {' | '.join([*shares, *apart])} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trio", type=Path)
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    parser.add_argument("--every", type=int, default=1, help="judge every Nth prompt only")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    prompts = read_lines(options.trio / f"{options.split}.jsonl")[:: options.every]
    found = measure(options.trio, prompts, options.strengths)
    sys.stdout.write((json.dumps(found, indent=2) if options.json else table(found)) + "\n")


if __name__ == "__main__":
    main()
