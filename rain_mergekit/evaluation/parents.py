"""How the models of a merge are related, from a few rows of their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rain_mergekit.checks.task_vector_size import sampled_rows
from rain_mergekit.models.checkpoint import Checkpoint

Rows = Mapping[str, Tensor]


@dataclass(frozen=True)
class Relation:
    """Two models: ||other - one|| / ||one||, and the cosine of their weights as vectors."""

    distance: float
    cosine: float


@dataclass(frozen=True)
class TaskVectorPair:
    """θ_I - θ_B and θ_R - θ_B: norms relative to θ_B, cosine, share of entries of one sign.

    agreement is that of entries that changed in both; 0.5 is chance.
    """

    instruct: float
    reasoning: float
    cosine: float
    agreement: float


def relations(rows: Mapping[str, Rows]) -> dict[tuple[str, str], Relation]:
    """Every pair of the models whose rows these are, by role."""
    roles = list(rows)
    pairs = [(a, b) for i, a in enumerate(roles) for b in roles[i + 1 :]]
    return {(a, b): relation(rows[a], rows[b]) for a, b in pairs}


def relation(one: Rows, other: Rows) -> Relation:
    """Distance and cosine of two models, from rows of the same tensors."""
    a, b = _flat(one), _flat(other)
    norms = float(a.norm()), float(b.norm())
    both = norms[0] * norms[1]
    distance = float((b - a).norm()) / norms[0] if norms[0] else math.nan
    return Relation(distance, float(a @ b) / both if both else math.nan)


def task_vector_pair(instruct: Rows, reasoning: Rows, pretrained: Rows) -> TaskVectorPair:
    """Norms, cosine and agreement in sign of two task vectors, from rows of the same tensors."""
    origin = _flat(pretrained)
    tuned, thinking = _flat(instruct) - origin, _flat(reasoning) - origin
    moved = (tuned != 0) & (thinking != 0)
    same = (tuned.sign() == thinking.sign())[moved]
    both = float(tuned.norm() * thinking.norm())
    norm = float(origin.norm())
    return TaskVectorPair(
        instruct=float(tuned.norm()) / norm if norm else math.nan,
        reasoning=float(thinking.norm()) / norm if norm else math.nan,
        cosine=float(tuned @ thinking) / both if both else math.nan,
        agreement=float(same.double().mean()) if len(same) else math.nan,
    )


def shared_rows(models: Mapping[str, Checkpoint]) -> dict[str, Rows]:
    """Up to 4 rows of up to 512 matrices of the layers that have the same shape in all models."""
    shared = frozenset.intersection(*(model.names for model in models.values()))
    shapes = [model.shapes(shared) for model in models.values()]
    same = (n for n, s in shapes[0].items() if len(s) > 1 and all(o[n] == s for o in shapes))
    names = sorted(same)  # every run takes the same ones
    found = sampled_rows([model.index for model in models.values()], names)
    return dict(zip(models, found, strict=True))


def _flat(rows: Rows) -> Tensor:
    return torch.cat([rows[name].flatten() for name in sorted(rows)] or [torch.zeros(0)]).double()
