"""Is Delta = W_instruct - W_pretrained of a sensible size? Asked of a few rows, before any work."""

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

from rain_mergekit.accepting import judge
from rain_mergekit.errors import RainError

LOG = logging.getLogger(__name__)
# A tuned model is near its origin, the packaged one at 0.14 of the weights. Two unrelated models of
# like norms are at sqrt(2): from 1 on the pretrained model is the wrong one.
LARGEST = 1.0
_CONTENT = ("index", "weights")  # a config may differ and the model be the same
_TENSORS, _ROWS = 512, 4


def check_task_vector(
    models: Mapping[str, str],
    fingerprints: Mapping[str, Mapping[str, str]],
    indices: Mapping[str, ShardedTensorIndex],
    names: Collection[str],
    accept: Collection[str],
) -> list[str]:
    """Refuse the same model given twice, and a task vector of nothing or larger than the weights.

    Args:
        models: what to call the models, by role.
        fingerprints: of `checkpoint.fingerprint`, by role.
        indices: of their checkpoints, by role.
        names: the tensors to be merged.
        accept: checks whose outcome is only a warning.
    """
    same = list(_same_models(models, fingerprints, indices))
    if same:
        return [judge("same_model", problem, accept) for problem in same]
    pair = indices["instruct"], indices["pretrained"]
    size = relative_size(*pair, names)
    tuned, origin = f"instruct model {models['instruct']}", f"pretrained {models['pretrained']}"
    if size == 0.0 and first_difference(*pair, names) is None:
        problem = f"the {tuned} and the {origin} differ in no tensor to be merged"
        return [judge("same_model", f"{problem}: the task vector is zero", accept)]
    if LARGEST <= size < math.inf:  # NaN and Inf are named with their tensor when it is read
        problem = f"the task vector is {size:.2g} times as large as the weights of the {origin}"
        return [judge("large_task_vector", f"{problem}: the {tuned} is not tuned from it", accept)]
    LOG.info("the task vector is %.3g of the pretrained weights", size)
    return []


def _same_models(
    models: Mapping[str, str],
    fingerprints: Mapping[str, Mapping[str, str]],
    indices: Mapping[str, ShardedTensorIndex],
) -> Iterator[str]:
    for one, other in combinations(fingerprints, 2):
        if {one, other} == {"reasoning", "pretrained"} and models[one] == models[other]:
            continue  # written twice, so meant: the reasoning model stands for the pretrained one
        alike = all(fingerprints[one][part] == fingerprints[other][part] for part in _CONTENT)
        names = indices[one].tensor_paths
        if alike and first_difference(indices[one], indices[other], names) is None:
            yield (
                f"the {one} model {models[one]} and the {other} model {models[other]} have equal "
                "weights: one model is given twice"
            )


def relative_size(
    instruct: ShardedTensorIndex, pretrained: ShardedTensorIndex, names: Iterable[str]
) -> float:
    """||Delta|| / ||W_pretrained|| over up to 4 rows of up to 512 of the tensors, evenly chosen.

    Exactly 0.0 only if no row of them differs; tensors that one model lacks are left out.
    """
    both = sorted(set(names) & set(instruct.tensor_paths) & set(pretrained.tensor_paths))
    chosen = both[:: max(1, -(-len(both) // _TENSORS))]
    tuned, origin = _sample(instruct, chosen), _sample(pretrained, chosen)
    change = sum(_square(tuned[name] - row) for name, row in origin.items())
    weights = sum(_square(row) for row in origin.values())
    return float((change / max(weights, torch.finfo(torch.float64).tiny)) ** 0.5)


def first_difference(
    instruct: ShardedTensorIndex, pretrained: ShardedTensorIndex, names: Iterable[str]
) -> str | None:
    """The first of the tensors that is not equal in both; reads them whole."""
    for name in names:
        with _opened(instruct, name) as one, _opened(pretrained, name) as other:
            if not bool((one.get_tensor(name) == other.get_tensor(name)).all()):
                return name
    return None


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
