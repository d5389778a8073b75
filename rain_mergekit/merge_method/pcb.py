"""`merge_method: pcb`: the models compete at each element (2410.02396), tensor by tensor.

β_i = softmax(N · norm(δ_i²)) · Σ_j softmax(norm(δ_i δ_j)), norm to 0..1; each model keeps the share
`density` of its elements with the largest β_i; τ = Σ β_i δ_i / Σ β_i over the models that kept the
element. This is the paper's formula with its thresholds found in each tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rain_mergekit.merge_method.companion import CompanionMerge, TaskVectors, by_task_vectors
from rain_mergekit.merge_method.parameters import number, shared
from rain_mergekit.merge_method.spec import Card

CARD = Card("pcb", "PCB-Merging", "https://arxiv.org/abs/2410.02396")


def pcb_delta(vectors: TaskVectors, parameters: Mapping[str, Any]) -> Tensor:
    """What is added to W_B: λ τ."""
    return balanced(vectors.deltas, parameters["density"]).mul_(parameters["lambda"])


def balanced(deltas: Sequence[Tensor], density: float) -> Tensor:
    """τ of task vectors of one shape; in the logarithm, where softmax would lose its digits."""
    scores = _scores(deltas)
    top = max(float(score.max()) for score in scores)
    total, weights = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, score in zip(deltas, scores, strict=True):
        share = torch.where(score >= _threshold(score, density), (score - top).exp_(), 0.0)
        weights += share
        total.addcmul_(share, delta)
    return torch.where(weights > 0, total.div_(weights), 0.0)


def _scores(deltas: Sequence[Tensor]) -> list[Tensor]:
    """log β of each model; the product of two task vectors counts for both."""
    inter = [torch.zeros_like(delta) for delta in deltas]
    intra = []
    for first, delta in enumerate(deltas):
        square = _to_unit(delta.square())
        intra.append(_normalised(square * len(deltas)))
        inter[first] += _softmax(square)
        for second in range(first + 1, len(deltas)):
            both = _softmax(_to_unit(delta * deltas[second]))
            inter[first] += both
            inter[second] += both
    return [logits.add_(sums.log_()) for logits, sums in zip(intra, inter, strict=True)]


def _softmax(logits: Tensor) -> Tensor:
    """softmax(x) times the number of elements, so that the numbers are near one; in place."""
    return _normalised(logits).add_(math.log(logits.numel())).exp_()


def _normalised(logits: Tensor) -> Tensor:
    """log softmax(x), in place."""
    return logits.sub_(logits.flatten().logsumexp(0))


def _to_unit(values: Tensor) -> Tensor:
    """Scaled to 0..1, in place; all zero where all are alike."""
    low, high = torch.aminmax(values)
    width = high - low
    return values.sub_(low).div_(width) if float(width) > 0 else values.zero_()


def _threshold(score: Tensor, density: float) -> Tensor:
    """The smallest score that is kept: of n elements max(1, round(density n))."""
    count = score.numel()
    kept = max(1, round(density * count))
    return score.flatten().kthvalue(count - kept + 1).values


METHOD = CompanionMerge.of(
    CARD,
    by_task_vectors(pcb_delta),
    (
        shared("density", 0.6, number("density", 0.0, 1.0, above=True)),
        shared("lambda", 0.8, number("lambda")),
    ),
)
