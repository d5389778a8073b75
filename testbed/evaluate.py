"""Judge a model by what it generates and by how far it is from the reasoning model.

`python -m testbed.evaluate MODEL_DIR REASONING_DIR PROMPTS.jsonl`
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from testbed.judging.divergence import divergences, marked, meter
from testbed.judging.scoring import score, summary
from testbed.models.generation import generate
from testbed.models.loading import LONGEST_OUTPUT, load_model, load_tokenizer, opens_block
from testbed.puzzles.records import Record, read_lines


def evaluate(
    model_dir: Path,
    reference_dir: Path,
    prompts: Sequence[Record],
    voice: PreTrainedTokenizerFast | None = None,
) -> dict[str, float]:
    """The numbers of one saved model against the saved reasoning model.

    It speaks through its own template, or `voice`'s; KL uses the reference's.
    """
    tokenizer = voice or load_tokenizer(model_dir)
    asked = [record["prompt"] for record in prompts]
    outputs = generate(load_model(model_dir), tokenizer, asked, most=LONGEST_OUTPUT)
    opened = opens_block(tokenizer)
    scores = [
        score(record, output.text, opened) for record, output in zip(prompts, outputs, strict=True)
    ]
    reference = load_tokenizer(reference_dir)
    texts = [marked(reference, record) for record in prompts]
    with meter(reference_dir, texts) as measuring:
        return {**summary(prompts, scores), **divergences(measuring, model_dir, texts)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--limit", type=int, help="judge only the first N prompts")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    found = evaluate(options.model, options.reference, read_lines(options.prompts)[: options.limit])
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
