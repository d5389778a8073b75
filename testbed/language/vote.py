"""RCP-Merging's vote (2508.03140): which elements of the instruct model's change are taken over.

    F = mean over texts of (g_R · θ_R)²         the prior, of the reasoning model
    p = penalty · F · (θ_R - θ_I)²              what an element has to make up for
    S = g_I · θ_I                               for each text, of the instruct model
    taken where more texts have S + p <= 0 than have not

g: the gradient of the mean loss over the tokens of one text that the model says itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from testbed.language.lessons import Encoded, Turn, encode
from testbed.language.scoring import split
from testbed.language.tuning import learnt_loss
from testbed.models.loading import load_model, load_tokenizer
from testbed.puzzles.records import Record

Weights = dict[str, Tensor]
Texts = Sequence[Encoded]
LOOKED_AT = 4  # texts by which the even penalty is found
SPARSE = 97  # and one in so many elements


def whole(tokenizer: PreTrainedTokenizerFast, record: Record) -> Encoded:
    """A text of which all that the model says counts."""
    return encode(tokenizer, (Turn(record["prompt"], "", record["output"]),))


def answer(tokenizer: PreTrainedTokenizerFast, record: Record) -> Encoded:
    """A text of which the answer behind the thinking counts."""
    head = split(record["output"]).head
    return encode(tokenizer, (Turn(record["prompt"], head, record["output"][len(head) :]),))


def first_order(model: PreTrainedModel, text: Encoded) -> Iterator[tuple[str, Tensor]]:
    """g · θ of one text, each weight of the model once (its shape and dtype)."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(learnt_loss(model, [text]), list(named.values()))
    for (name, weight), gradient in zip(named.items(), found, strict=True):
        yield name, gradient.mul_(weight.detach())


def prior(reasoning: PreTrainedModel, texts: Texts) -> Weights:
    """F: the mean of (g · θ)², as the published code has it; the paper has g²."""
    total = {n: torch.zeros_like(w) for n, w in reasoning.named_parameters()}
    for text in texts:
        for name, found in first_order(reasoning, text):
            total[name].add_(found.square_(), alpha=1 / len(texts))
    return total


def distances(prior: Weights, reasoning: PreTrainedModel, instruct: PreTrainedModel) -> Weights:
    """F · (θ_R - θ_I)², in place of the prior."""
    other = dict(instruct.named_parameters())
    for name, weight in reasoning.named_parameters():
        prior[name].mul_((weight.detach() - other[name].detach()).square_())
    return prior


def even_penalty(instruct: PreTrainedModel, texts: Texts, unit: Weights) -> float:
    """The penalty at which prior and sensitivity are of the same size at the middle element.

    unit: what the prior asks for at a penalty of 1.
    """
    sizes = [
        found.flatten()[::SPARSE].abs()
        for text in texts[:LOOKED_AT]
        for _, found in first_order(instruct, text)
    ]
    asked = [tensor.flatten()[::SPARSE] for tensor in unit.values()]
    return float(torch.cat(sizes).median() / torch.cat(asked).median())


@dataclass(frozen=True)
class Tally:
    """Texts for an element less texts against it, of all texts and of the first half alone."""

    votes: Weights
    early: Weights

    @property
    def mask(self) -> Weights:
        """Where the element is taken; a tie is none."""
        return {name: votes > 0 for name, votes in self.votes.items()}

    @property
    def agreement(self) -> float:
        """The share of elements on which both halves of the texts decide alike."""
        pairs = ((self.early[name], votes) for name, votes in self.votes.items())
        alike = [((early > 0) == (votes - early > 0)).sum() for early, votes in pairs]
        return int(sum(alike)) / sum(votes.numel() for votes in self.votes.values())


def tallied(
    instruct: PreTrainedModel, texts: Texts, unit: Weights, penalties: Sequence[float]
) -> list[Tally]:
    """One tally for each penalty. unit: what the prior asks for at a penalty of 1."""
    tallies = [Tally(_zeros(unit), {}) for _ in penalties]
    for number, text in enumerate(texts):
        for name, found in first_order(instruct, text):
            for penalty, tally in zip(penalties, tallies, strict=True):
                against = torch.add(found, unit[name], alpha=penalty) > 0
                tally.votes[name].add_(1).add_(against, alpha=-2)
        if number + 1 == len(texts) // 2:
            for tally in tallies:
                tally.early.update({n: votes.clone() for n, votes in tally.votes.items()})
    return tallies


def _zeros(like: Weights) -> Weights:
    return {name: torch.zeros(t.shape, dtype=torch.int16) for name, t in like.items()}


def density(mask: Mapping[str, Tensor]) -> float:
    """The share of elements that a mask takes."""
    return sum(int(m.sum()) for m in mask.values()) / sum(m.numel() for m in mask.values())


def complement(mask: Weights) -> Weights:
    """What the mask leaves."""
    return {name: ~taken for name, taken in mask.items()}


def at_random(mask: Weights, seed: int) -> Weights:
    """As many elements of each tensor as the mask takes, any of them."""
    dice, found = torch.Generator().manual_seed(seed), {}
    for name, taken in mask.items():
        order = torch.randperm(taken.numel(), generator=dice)
        found[name] = torch.zeros(taken.numel(), dtype=torch.bool)
        found[name][order[: int(taken.sum())]] = True
        found[name] = found[name].view(taken.shape)
    return found


def write_masked(trio: Path, mask: Weights, out: Path) -> None:
    """The instruct model where the mask takes it, else the pretrained one: nothing is rounded."""
    instruct = dict(load_model(trio / "instruct").named_parameters())
    model = load_model(trio / "pretrained")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.where(mask[name], instruct[name], weight))
    model.bfloat16().save_pretrained(out)
    load_tokenizer(trio / "instruct").save_pretrained(out)
