"""The training loop: one thread, float32, loss on completions only."""

import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from testbed.models.loading import render
from testbed.puzzles.family import Family, Mixture, Stage
from testbed.puzzles.samples import training_pair

LOG = logging.getLogger(__name__)
POOL = 32
Sample = tuple[list[int], int]
Batch = tuple[torch.Tensor, torch.Tensor]
# Draws a prompt, what is given of the reply, and the completion that is learnt.
Draw = Callable[[Family, Mixture, random.Random, int], tuple[str, str, str]]


def from_the_start(
    family: Family, mixture: Mixture, rng: random.Random, seed: int
) -> tuple[str, str, str]:
    """A training pair of the family; nothing of its reply is given."""
    prompt, completion = training_pair(family, mixture, rng, seed)
    return prompt, "", completion


@dataclass(frozen=True)
class Run:
    """One stage of one trio: what to train on and where the random numbers come from.

    pool: how many batches are drawn together and divided by length; 1 leaves each batch mixed,
    where the length of a completion gives away its kind.
    """

    family: Family
    stage: Stage
    tokenizer: PreTrainedTokenizerFast
    rng: random.Random
    seed: int
    draw: Draw = from_the_start
    pool: int = POOL


def encode_pairs(run: Run, count: int) -> list[Sample]:
    """Token ids of prompt, given text and completion, with the length of the first two."""
    family, mixture = run.family, run.stage.mixture
    drawn = [run.draw(family, mixture, run.rng, run.seed) for _ in range(count)]
    heads = [render(run.tokenizer, prompt) + given for prompt, given, _ in drawn]
    tails = [tail + family.surface.end for _, _, tail in drawn]
    texts = [_joined(head, tail) for head, tail in zip(heads, tails, strict=True)]
    starts = run.tokenizer(heads, add_special_tokens=False)["input_ids"]
    whole = run.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [(ids, len(start)) for ids, start in zip(whole, starts, strict=True)]


def _joined(head: str, completion: str) -> str:
    opening = "<think>\n"
    return head + (completion.removeprefix(opening) if head.endswith(opening) else completion)


def collate(samples: list[Sample], pad: int) -> Batch:
    """Right-padded ids and labels; causal attention needs no mask for padding on the right."""
    width = max(len(ids) for ids, _ in samples)
    ids = torch.full((len(samples), width), pad)
    labels = torch.full((len(samples), width), -100)
    for row, (tokens, start) in enumerate(samples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, start : len(tokens)] = torch.tensor(tokens[start:])
    return ids, labels


def batches(run: Run) -> Iterator[Batch]:
    """Batches of like length, drawn from pools so that little is spent on padding."""
    left, size = run.stage.steps, run.stage.batch
    while left > 0:
        taken = min(run.pool, left)
        samples = sorted(encode_pairs(run, taken * size), key=lambda sample: len(sample[0]))
        pool = [samples[i * size : (i + 1) * size] for i in range(taken)]
        run.rng.shuffle(pool)
        for chosen in pool:
            yield collate(chosen, int(run.tokenizer.pad_token_id))
        left -= taken


def base_optimizers(model: PreTrainedModel, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, Adam for the rest: a better base in less time."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers." in name)]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=rate / 4, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def tuning_optimizers(model: PreTrainedModel, rate: float) -> list[torch.optim.Optimizer]:
    """Adam for everything, as fine-tuning usually is."""
    return [torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)]


def train_stage(model: PreTrainedModel, run: Run, *, from_scratch: bool) -> None:
    """Train the model in place on one stage."""
    stage = run.stage
    optimizers = (base_optimizers if from_scratch else tuning_optimizers)(model, stage.rate)
    schedules = [LambdaLR(o, lambda step: _rate(step, stage.steps)) for o in optimizers]
    model.train()
    began = time.process_time()
    for step, (ids, labels) in enumerate(batches(run)):
        loss = completion_loss(model, ids, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        model.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == stage.steps - 1:
            LOG.info(
                "step %d loss %.4f, %.0f CPU s", step, loss.item(), time.process_time() - began
            )
    model.train(mode=False)


def _rate(step: int, steps: int) -> float:
    warm, cool = min(1.0, (step + 1) / 30), (steps - step) / steps
    return warm * min(1.0, cool * 1.5)


def completion_loss(
    model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy on the completion; only its positions reach the output matrix."""
    hidden = model.get_decoder()(  # type: ignore[no-untyped-call]
        input_ids=ids
    ).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    wanted = targets != -100
    logits = model.get_output_embeddings()(hidden[wanted])  # type: ignore[no-untyped-call]
    return cross_entropy(logits.float(), targets[wanted])
