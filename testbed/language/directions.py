"""What fitting a wide input within some of its directions costs, on one layer of a trio.

    python -m testbed.language.directions --trio TRIO

The down projection of one layer is fitted so that the layer's output becomes the instruct model's
at answers and stays the reasoning model's elsewhere. One line a way: the relative error at the
answers of texts that were neither fitted nor chosen by. A thinned row fits single tokens within
the memory that the landmarks above it take.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rain_mergekit.calibration.fit_rule import LANDMARKS, MATRICES
from rain_mergekit.linalg.landmarks import LandmarkSums, evenly_by_weight, spanned
from rain_mergekit.linalg.ridge_fit import RidgeSums
from testbed.language.scoring import split
from testbed.models.loading import load_model, load_tokenizer, render
from testbed.puzzles.records import Record, read_lines

LAYER, SHARES = 15, (0.09, 0.14, 0.3)
CHOOSING, HELD_OUT = 0.1, 0.2  # of the texts
ANSWERS, OTHERS = 1.0, 1.5  # what each group of tokens weighs
WEIGHT = "down_proj"


@dataclass(frozen=True)
class Tokens:
    """Inputs (n, d), errors (n, d_out), and which are of answers (n)."""

    inputs: Tensor
    errors: Tensor
    answers: Tensor

    @classmethod
    def joined(cls, parts: Sequence["Tokens"]) -> "Tokens":
        return cls(*(torch.cat([getattr(p, f) for p in parts]) for f in cls.__annotations__))

    @property
    def weights(self) -> Tensor:
        count = int(self.answers.sum())
        return torch.where(self.answers, ANSWERS / count, OTHERS / (len(self.answers) - count))

    def some(self, which: Tensor) -> "Tokens":
        return Tokens(self.inputs[which], self.errors[which], self.answers[which])

    def left(self, change: Tensor) -> float:
        """The relative error at answers after a change (d_out, d)."""
        inputs, errors = (rows[self.answers].double() for rows in (self.inputs, self.errors))
        return float((errors - inputs @ change.mT).square().sum() / errors.square().sum())


@torch.inference_mode()
def passed(model: PreTrainedModel, ids: list[int]) -> tuple[Tensor, Tensor]:
    """What the down projection of the last layer receives, and what that layer gives."""
    layer, found = model.model.layers[-1], {}
    hooks = (
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, i: found.update(inputs=i[0][0])),
        layer.register_forward_hook(lambda _, __, o: found.update(after=o)),
    )
    model.model(input_ids=torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found["inputs"], found["after"].reshape(len(ids), -1)


def text(
    reasoning: PreTrainedModel,
    instruct: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    record: Record,
) -> Tokens:
    """One text of the instruction set."""
    head = render(tokenizer, record["prompt"]) + split(record["output"]).head
    before = len(tokenizer.encode(head, add_special_tokens=False))
    whole = render(tokenizer, record["prompt"]) + record["output"]
    ids = tokenizer.encode(whole, add_special_tokens=False)
    inputs, own = passed(reasoning, ids)
    answers = torch.arange(len(ids)) >= before
    errors = (passed(instruct, ids)[1] - own) * answers[:, None]
    return Tokens(inputs, errors, answers)


def fitted(sums: RidgeSums | LandmarkSums, tokens: Tokens, choosing: Tokens) -> Tensor:
    """The change at full rank, with the penalty that fits the tokens for choosing best."""
    for part, aside in ((tokens, False), (choosing, True)):
        sums.add(part.inputs, {WEIGHT: part.errors}, part.weights.double(), aside=aside)
    return sums.changes(None, len(tokens.errors.mT), 1.0)[WEIGHT].matrix


def main() -> None:
    """All ways on one layer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trio", type=Path, required=True)
    parser.add_argument("--layer", type=int, default=LAYER)
    parser.add_argument("--samples", type=int, default=160)
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = [load_model(options.trio / role) for role in ("reasoning", "instruct")]
    for model in models:
        model.model.layers = model.model.layers[: options.layer + 1]
    tokenizer = load_tokenizer(options.trio / "reasoning")
    records = read_lines(options.trio / "instruction.jsonl")[: options.samples]
    texts = [text(*models, tokenizer, record) for record in records]
    last, middle = (round(len(texts) * (1 - x)) for x in (HELD_OUT, HELD_OUT + CHOOSING))
    parts = (texts[:middle], texts[middle:last], texts[last:])
    compare(*(Tokens.joined(part) for part in parts))


def compare(tokens: Tokens, choosing: Tokens, unseen: Tokens) -> None:
    """One line a way."""
    width, rows = tokens.inputs.shape[1], tokens.errors.shape[1]
    outputs, device = {WEIGHT: rows}, tokens.inputs.device

    def said(name: str, change: Tensor) -> None:
        print(f"{name:40} {unseen.left(change):.2f}", flush=True)

    print(f"{len(tokens.inputs):,} tokens, {int(tokens.answers.sum()):,} of answers")
    every = RidgeSums(width, outputs, device, choose=True)
    said(f"all {width:,} directions", fitted(every, tokens, choosing))
    for share in SHARES:
        count = int(width * share)
        chosen = evenly_by_weight(tokens.weights, count)
        sums = LandmarkSums(spanned(tokens.inputs[chosen]), outputs, choose=True)
        said(f"within {len(chosen):,} directions", fitted(sums, tokens, choosing))
        # MATRICES n² + 4 (d + d_out) n bytes: K and the rows
        half = 2 * (width + rows) / MATRICES
        bytes_taken = MATRICES * count**2 + LANDMARKS * width * count
        step = -(-len(tokens.inputs) // int((half**2 + bytes_taken / MATRICES) ** 0.5 - half))
        thin = tokens.some(torch.arange(0, len(tokens.inputs), step))
        every = RidgeSums(width, outputs, device, choose=True)
        said(f"one token in {step}", fitted(every, thin, choosing))


if __name__ == "__main__":
    main()
