"""Check the size of what makes up the task vector on a few sampled rows."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import combinations, groupby
from typing import Any

import torch
from mergekit.io.lazy_tensor_loader import ShardedTensorIndex
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rain_mergekit.checks.accept import refuse_unless_accepted
from rain_mergekit.errors import RainError

LOG = logging.getLogger(__name__)
# A tuned model is close to its pretrained model: the packaged one at 0.14 of the weights' norm.
# Unrelated models of equal norms differ by about sqrt(2) of it, so a ratio of 1 or more means that
# the wrong pretrained model is configured.
LARGEST = 1.0
# Rounding to bfloat16 changes a number by less than this; light training may, too.
ROUNDING = 2.0**-8
_CONTENT = ("index", "weights")  # configs may differ for the same model
_TENSORS, _ROWS = 512, 4


def check_task_vector(
    models: Mapping[str, str],
    fingerprints: Mapping[str, Mapping[str, str]],
    indices: Mapping[str, ShardedTensorIndex],
    names: Collection[str],
    accept: Collection[str],
    gamma: float = 0.0,
) -> list[str]:
    """Refuse the same model given twice, and a task vector of nothing or larger than the weights.

    Of a task vector (W_I - W_B) - gamma (W_R - W_B) each difference is looked at.

    Args:
        models: what to call the models, by role.
        fingerprints: of `checkpoint.fingerprint`, by role.
        indices: of their checkpoints, by role; roles that are not there are not looked at.
        names: the tensors to be merged.
        accept: checks whose outcome is only a warning.
        gamma: 0: W_I - W_B alone; 1: W_I - W_R alone.
    """
    same = list(_same_models(models, fingerprints, indices, names))
    if same:
        return [refuse_unless_accepted("same_model", problem, accept) for problem in same]
    found = []
    for tuned, origin in differences(gamma):
        if not {tuned, origin} <= indices.keys():
            continue
        size = relative_size(indices[tuned], indices[origin], names)
        LOG.info("%s less %s is %.3g of the smaller's weights", tuned, origin, size)
        if size >= LARGEST:
            one, other = f"{tuned} model {models[tuned]}", f"{origin} {models[origin]}"
            near = cosine(indices[tuned], indices[origin], names)
            problem = (
                f"the task vector is {size:.2g} times as large as the weights of the smaller of "
                f"the {one} and the {other} (cosine of the two {near:.2f}; of models without a "
                f"common origin about 0): the {one} is not tuned from it"
                + (", nor from what it was tuned from" if origin == "reasoning" else "")
            )
            found.append(refuse_unless_accepted("large_task_vector", problem, accept))
    return found


def differences(gamma: float) -> list[tuple[str, str]]:
    """The pairs of roles, first less second, that make up the task vector."""
    if gamma == 1:
        return [("instruct", "reasoning")]
    tuned = ["instruct", "reasoning"] if gamma else ["instruct"]
    return [(role, "pretrained") for role in tuned]


def _same_models(
    models: Mapping[str, str],
    fingerprints: Mapping[str, Mapping[str, str]],
    indices: Mapping[str, ShardedTensorIndex],
    names: Collection[str],
) -> Iterator[str]:
    for one, other in combinations(indices, 2):
        if {one, other} == {"reasoning", "pretrained"} and models[one] == models[other]:
            continue  # written twice, so meant: the reasoning model stands for the pretrained one
        who = f"the {one} model {models[one]} and the {other} model {models[other]}"
        alike = all(fingerprints[one][part] == fingerprints[other][part] for part in _CONTENT)
        pair = indices[one], indices[other]
        if alike and first_difference(*pair, indices[one].tensor_paths) is None:
            yield f"{who} have equal weights: one model is given twice"
        elif relative_size(*pair, names) <= ROUNDING and first_difference(*pair, names) is None:
            what = "one model is given twice" if one == "reasoning" else "the task vector is zero"
            yield f"{who} differ in no tensor to be merged, unless by rounding: {what}"


def relative_size(
    instruct: ShardedTensorIndex, pretrained: ShardedTensorIndex, names: Iterable[str]
) -> float:
    """||W_I - W_B|| over the smaller of ||W_I|| and ||W_B||; infinite if that one is zero.

    Over up to 4 rows of up to 512 of the tensors, evenly chosen. Tensors that one model lacks are
    left out. NaN if no tensor is shared or a value is not finite (NaN compares as not larger).
    """
    both = _in_both(instruct, pretrained, names)
    tuned, origin = sampled_rows((instruct, pretrained), both)
    change = sum(_square(tuned[name] - row) for name, row in origin.items())
    weights = min(sum(map(_square, rows.values())) for rows in (tuned, origin))
    if not both or not math.isfinite(change + weights):  # it is named with its tensor when read
        return math.nan
    if not weights:
        return math.inf if change else 0.0
    return float((change / weights) ** 0.5)


def cosine(one: ShardedTensorIndex, other: ShardedTensorIndex, names: Iterable[str]) -> float:
    """Cosine of the weights as two vectors, from the rows of `relative_size`; NaN for zero."""
    rows = sampled_rows((one, other), _in_both(one, other, names))
    product = sum(float((row * rows[1][name]).sum()) for name, row in rows[0].items())
    norms = math.prod(sum(map(_square, side.values())) for side in rows)
    return product / math.sqrt(norms) if norms else math.nan


def sampled_rows(
    indices: Sequence[ShardedTensorIndex], names: Sequence[str]
) -> list[Mapping[str, Tensor]]:
    """Up to 4 rows of up to 512 of the named tensors, evenly chosen, of each checkpoint; float64.

    All of them have every tensor.
    """
    chosen = names[:: max(1, -(-len(names) // _TENSORS))]
    return [_sample(index, chosen) for index in indices]


def first_difference(
    instruct: ShardedTensorIndex, pretrained: ShardedTensorIndex, names: Iterable[str]
) -> str | None:
    """The first of the tensors in both that is not equal; reads them whole.

    Numbers of two types count as equal if rounding to the narrower type explains the difference.
    """
    for name in _in_both(instruct, pretrained, names):
        with _opened(instruct, name) as one, _opened(pretrained, name) as other:
            if not _equal(one.get_tensor(name), other.get_tensor(name)):
                return name
    return None


def _in_both(one: ShardedTensorIndex, other: ShardedTensorIndex, names: Iterable[str]) -> list[str]:
    return sorted(set(names) & set(one.tensor_paths) & set(other.tensor_paths))


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.dtype == other.dtype or not (one.is_floating_point() and other.is_floating_point()):
        return one.shape == other.shape and bool((one == other).all())
    coarse = max(torch.finfo(tensor.dtype).eps for tensor in (one, other))
    least = max(torch.finfo(tensor.dtype).smallest_normal for tensor in (one, other))
    near = torch.isclose(one.float(), other.float(), rtol=coarse, atol=least * coarse)
    return one.shape == other.shape and bool(near.all())


def _sample(index: ShardedTensorIndex, names: Sequence[str]) -> Mapping[str, Tensor]:
    found: dict[str, Tensor] = {}
    by_shard = sorted(names, key=lambda name: index.tensor_paths[name])
    for _, members in groupby(by_shard, key=lambda name: index.tensor_paths[name]):
        together = list(members)
        with _opened(index, together[0]) as file:
            found.update({name: _rows(file.get_slice(name)) for name in together})
    return found


def _rows(view: Any) -> Tensor:
    height, *rest = view.get_shape()
    rows = range(0, height, max(1, height // _ROWS))[:_ROWS]
    # Of a tensor of experts one slice would be a whole matrix: a few rows of some of them.
    parts = [view[i : i + 1] if len(rest) < 2 else view[i : i + 1, :_ROWS] for i in rows]
    return torch.cat(parts).double()


def _opened(index: ShardedTensorIndex, name: str) -> Any:
    path = os.path.join(index.base_path, index.tensor_paths[name])
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise RainError(f"{path}: cannot read the checkpoint: {error}") from None


def _square(rows: Tensor) -> float:
    return float(rows.square().sum())
