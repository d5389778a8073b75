"""What the check that a reasoning model thinks sees of each model of the shipped trios.

`python -m testbed.thinking` prints the mean probabilities of the markers' first tokens on each
trio's reasoning set and, where the chat template opens the block, the thinking's log-likelihood a
token, as docs/troubleshooting.md has them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from mergekit.common import ModelReference
from transformers import AutoConfig

from rain_mergekit.capture.layer_calls import run_layer
from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.checks.thinking_likelihood import Likelihood, likelihood, shortest
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.system.distributed import World
from rain_mergekit.text.calibration_sets import load_reasoning
from rain_mergekit.text.token_positions import ReasoningTokens
from testbed.models.loading import load_tokenizer

TRIOS = Path(__file__).parent / "trios"
ROLES = ("reasoning", "instruct", "pretrained")


def seen(model: Path, samples: Sequence[ReasoningTokens]) -> Likelihood:
    """With this model in the reasoning model's place, on samples that its template rendered."""
    checkpoint = Checkpoint.open(ModelReference.model_validate({"model": {"path": str(model)}}))
    shell = LayerwiseModel.open(checkpoint, AutoConfig.from_pretrained(model), torch.float32, "cpu")
    recorded = list(shell.record([sample.input_ids for sample in samples]))
    states = [hidden for hidden, _ in recorded]
    for index in range(len(shell.layers)):
        with shell.layer(index) as layer:
            states = [
                run_layer(layer, hidden, calls[index])
                for hidden, (_, calls) in zip(states, recorded, strict=True)
            ]
    return likelihood(shell, samples, states, World(shell.device), shortest(samples))


def main() -> None:
    for trio in sorted(TRIOS.iterdir()):
        tokenizer = load_tokenizer(trio / "reasoning")
        samples = load_reasoning(trio / "reasoning.jsonl", tokenizer).samples
        for role in ROLES:
            found = seen(trio / role, samples)
            opening, thinking = (
                "-" if value is None else f"{value:.2g}" for value in (found.open, found.thinking)
            )
            verdict = "thinks" if found.thinks else "refused"
            row = (trio.name, role, opening, f"{found.close:.2g}", thinking, verdict)
            sys.stdout.write(f"| {' | '.join(row)} |\n")


if __name__ == "__main__":
    main()
