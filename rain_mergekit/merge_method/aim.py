"""`merge_method: aim`: changes of busy input channels are taken back in part (2502.02421).

W = W_B + λ (W_M - W_B) · (1 - s (1 - ω)), by input channel: W_M is merged by task arithmetic or
TIES, s is how busy a channel is on calibration texts in the pretrained model, relative to the
busiest. The calibration file holds s as `cols`; tensors that it does not list are merged as W_M.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

import torch
from mergekit.merge_methods.base import TensorGroup
from torch import Tensor

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.config.method_names import AIM
from rain_mergekit.errors import RainError
from rain_mergekit.merge_method.cache import CalibrationCache
from rain_mergekit.merge_method.companion import (
    CompanionMerge,
    TaskVectors,
    number,
    one_of,
    shared,
)
from rain_mergekit.merge_method.spec import Card, RainMergeError, reported, require_kind

CARD = Card(AIM, "AIM", "https://arxiv.org/abs/2502.02421")
_FILES = CalibrationCache()


def aim_delta(vectors: TaskVectors, parameters: Mapping[str, Any]) -> Tensor:
    """What is added to W_B."""
    calibration: CalibrationFile = parameters["calibration"]
    total = _ties(vectors, parameters["density"]) if _by_ties(parameters) else _sum(vectors)
    plan = calibration.tensors.get(vectors.name)
    if plan is not None and plan.cols is not None:
        if tuple(total.shape) != plan.shape:
            raise RainError(
                f"{vectors.name} has shape {list(total.shape)}, the calibration expects "
                f"{list(plan.shape)}: it was made for another model"
            )
        scale = calibration.scale(plan.cols)
        assert scale is not None  # noqa: S101 - there is a key
        if parameters["shuffle"] == "channels":
            scale = scale[_permutation(plan.cols, len(scale))]
        kept = (1 - scale * (1 - parameters["omega"])).mul_(parameters["lambda"]).to(total)
        return total.mul_(kept if plan.input_axis == -1 else kept[:, None])
    strength: float = parameters["lambda"]
    return total if strength == 1 else total.mul_(strength)


def _sum(vectors: TaskVectors) -> Tensor:
    """The task vectors' sum, in the place of the first: nobody needs that again."""
    total = vectors.deltas[0]
    for delta in vectors.deltas[1:]:
        total += delta
    return total


def _by_ties(parameters: Mapping[str, Any]) -> bool:
    found: bool = parameters["merge"] == "ties"
    return found


def _ties(vectors: TaskVectors, density: float) -> Tensor:
    """mergekit's own TIES of the task vectors, whose weights they have already."""
    from mergekit import merge_methods  # noqa: PLC0415 - complete only when a merge runs

    zero = torch.zeros_like(vectors.deltas[0])
    group = TensorGroup.from_tensors([zero, *vectors.deltas], base_index=0)
    options = {"weight": 1.0, "density": density}
    merged: Tensor = merge_methods.get("ties")([group], parameters=options)[0]
    return merged


def _permutation(key: str, count: int) -> Tensor:
    """The same for all weights that share an input, and in every process."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _calibration(value: object) -> CalibrationFile:
    with reported():
        if not isinstance(value, (str, PathLike)) or not str(value):
            raise RainError(
                "merge_method: aim needs `parameters: {calibration: PATH}`, the file that "
                "`mergekit-rain calibrate CONFIG` writes"
            )
        found = _FILES.open(str(fspath(value)))
        require_kind(found, CARD.name)
    return found


def _role(value: object) -> str | None:
    if value not in (None, "reasoning", "instruct"):
        raise RainMergeError(f"role must be reasoning or instruct, found {value!r:.80}")
    return None if value is None else str(value)


class AimMerge(CompanionMerge):
    """With a calibration file that must have been made for the base model."""

    def __init__(self) -> None:
        parameters = (
            shared("calibration", None, _calibration, str),
            shared("omega", 0.4, number("omega", 0.0, 1.0)),
            shared("merge", "task_arithmetic", one_of("merge", "task_arithmetic", "ties"), str),
            shared("density", 0.5, number("density", 0.0, 1.0, above=True)),
            shared("shuffle", "off", one_of("shuffle", "off", "channels"), str),
            shared("lambda", 1.0, number("lambda")),
        )
        super().__init__(CARD, aim_delta, parameters, per_model={"role": _role})

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one tensor, the first time after a look at the base model's fingerprint."""
        from rain_mergekit.merge_method.base_check import check_base  # noqa: PLC0415 - needs mergekit

        with reported(), torch.device("cpu"):
            check_base(parameters["calibration"], group.base.id)
        return super().merge_group(group, **parameters)


METHOD = AimMerge()
