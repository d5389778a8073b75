"""The weights of a merge before they were rounded to the type that they are stored in."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from torch import nn

from rain_mergekit.apply import merged_weight
from rain_mergekit.artifact import CalibrationFile, Factors, TensorPlan
from rain_mergekit.checkpoint import Checkpoint
from rain_mergekit.config import read_config
from rain_mergekit.errors import RainError
from rain_mergekit.measure import check_reasoning
from rain_mergekit.models import LoadOptions, open_model


class Unrounded:
    """W_R + lambda (S_row Delta S_col)(I - U V^T) in float32, layer by layer.

    From the configuration that mergekit leaves in a merged model's folder and the calibration file
    that it names. RainError says what is missing for it.
    """

    def __init__(self, folder: str, reasoning: Checkpoint, options: LoadOptions) -> None:
        config = read_config(Path(folder, "mergekit_config.yml"))
        self._strength = strength_of(config.text)
        self._file = CalibrationFile.open(config.calibration)
        check_reasoning(self._file, reasoning)
        whole = all(_whole(plan) for plan in self._file.tensors.values())
        if not whole:
            raise RainError(f"{config.calibration}: it merges fused experts")
        opened = (open_model(config.models[role], options) for role in ("instruct", "pretrained"))
        self._models = reasoning, *opened

    def fill(self, layer: nn.Module, prefix: str) -> None:
        """Put the merged weights in place of a filled layer's; `prefix` is the layer's name."""
        for name, parameter in layer.named_parameters():
            plan = self._file.tensors.get(f"{prefix}.{name}")
            if plan is None:
                continue
            reasoning, instruct, pretrained = (
                model.get(f"{prefix}.{name}").to(parameter.device, torch.float32)
                for model in self._models
            )
            parameter.data = merged_weight(
                reasoning,
                instruct,
                pretrained,
                factors=self._factors(plan),
                rows=self._file.scale(plan.rows),
                cols=self._file.scale(plan.cols),
                strength=self._strength,
                input_axis=plan.input_axis,
            )
        for model in self._models:
            model.release()

    def _factors(self, plan: TensorPlan) -> Factors:
        none = Factors(None, None)
        return self._file.factors(plan.site) if isinstance(plan.site, str) else none


def _whole(plan: TensorPlan) -> bool:
    return len(plan.shape) == 2 and not isinstance(plan.site, tuple)


def strength_of(text: str) -> float:
    """Lambda of a merge configuration; RainError if it is not one number."""
    value = (yaml.safe_load(text).get("parameters") or {}).get("lambda", 1.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RainError(f"mergekit_config.yml: lambda is {value!r}, not one number")
    return float(value)
