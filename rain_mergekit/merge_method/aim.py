"""`merge_method: aim`: changes of busy input channels are taken back in part (2502.02421).

W = W_B + λ (W_M - W_B) · (1 - s (1 - ω)), by input channel: W_M is merged by task arithmetic or
TIES, s is how busy a channel is on calibration texts in the pretrained model, relative to the
busiest. The calibration file holds s as `cols`; tensors that it does not list are merged as W_M.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from mergekit.merge_methods.base import TensorGroup
from torch import Tensor

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.config.method_names import AIM
from rain_mergekit.errors import RainError
from rain_mergekit.linalg.merged_weight import summed_weight
from rain_mergekit.merge_method.cache import CalibrationCache
from rain_mergekit.merge_method.companion import CompanionMerge, TaskVectors, by_task_vectors
from rain_mergekit.merge_method.parameters import (
    calibration_for,
    number,
    one_of,
    role,
    shared,
)
from rain_mergekit.merge_method.spec import Card

CARD = Card(AIM, "AIM", "https://arxiv.org/abs/2502.02421")


def aim_merged(group: TensorGroup, parameters: Mapping[str, Any]) -> Tensor:
    """Merge one tensor; the first time, check that the calibration is the base model's."""
    from rain_mergekit.merge_method.base_check import check_base  # noqa: PLC0415 - needs mergekit

    with torch.device("cpu"):
        check_base(parameters["calibration"], group.base.id)
    if parameters["merge"] == "ties":
        return _relaxed_ties(group, parameters)
    base = group.base.tensor
    kept, axis = _kept(group.metadata.name or "", base, parameters)
    weights = parameters["weight"]
    tuned = [(entry.tensor, weights[entry.id]) for entry in group.non_base]
    return summed_weight(base, tuned, kept, parameters["lambda"], axis)


def _kept(name: str, base: Tensor, parameters: Mapping[str, Any]) -> tuple[Tensor | None, int]:
    """1 - s (1 - ω) by input channel (d_in), and the channels' axis; None: nothing goes back."""
    calibration: CalibrationFile = parameters["calibration"]
    plan = calibration.tensors.get(name)
    scale = None if plan is None else calibration.scale(plan.cols)
    if plan is None or scale is None:
        return None, -1
    if tuple(base.shape) != plan.shape:
        raise RainError(
            f"{name} has shape {list(base.shape)}, the calibration expects {list(plan.shape)}: it "
            "was made for another model"
        )
    if parameters["shuffle"] == "channels":
        scale = scale[_permutation(str(plan.cols), len(scale))]
    return 1 - scale * (1 - parameters["omega"]), plan.input_axis


@by_task_vectors
def _relaxed_ties(vectors: TaskVectors, parameters: Mapping[str, Any]) -> Tensor:
    """What is added to W_B: mergekit's own TIES of the weighted task vectors, in part."""
    from mergekit import merge_methods  # noqa: PLC0415 - complete only when a merge runs

    zero = torch.zeros_like(vectors.deltas[0])
    group = TensorGroup.from_tensors([zero, *vectors.deltas], base_index=0)
    options = {"weight": 1.0, "density": parameters["density"]}
    total: Tensor = merge_methods.get("ties")([group], parameters=options)[0]
    kept, axis = _kept(vectors.name, total, parameters)
    if kept is not None:
        total *= kept.to(total) if axis == -1 else kept.to(total)[:, None]
    return total.mul_(parameters["lambda"])


def _permutation(key: str, count: int) -> Tensor:
    """A fixed random order, the same in every process and for all weights that share an input."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


METHOD = CompanionMerge.of(
    CARD,
    aim_merged,
    (
        shared("calibration", None, partial(calibration_for, AIM, CalibrationCache()), str),
        shared("omega", 0.4, number("omega", 0.0, 1.0)),
        shared("merge", "task_arithmetic", one_of("merge", "task_arithmetic", "ties"), str),
        shared("density", 0.5, number("density", 0.0, 1.0, above=True)),
        shared("shuffle", "off", one_of("shuffle", "off", "channels"), str),
        shared("lambda", 1.0, number("lambda")),
    ),
    per_model={"role": role("reasoning", "instruct")},
)
