"""Adds to a merged model what stock mergekit left out of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.common import dtype_from_name
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rain_mergekit.artifact import CalibrationFile
from rain_mergekit.config import RainConfig
from rain_mergekit.decoders import empty_model
from rain_mergekit.host import left_out
from rain_mergekit.method import RainMerge
from rain_mergekit.models import LoadOptions, open_model, read_model_config
from rain_mergekit.names import merge_names
from rain_mergekit.tensors import ModelTensors
from rain_mergekit.unrounded import strength_of

_INDEX = "model.safetensors.index.json"


class Completion:
    """What is missing of a merge, known before it begins; `write` adds it to the finished one.

    Weights that the calibration covers are merged like all others, the rest are the reasoning
    model's. Experts that a model holds in one tensor are written as that tensor. RainError if
    something is missing and lambda is not one number.
    """

    def __init__(self, config: RainConfig, options: LoadOptions) -> None:
        checkpoints = {role: open_model(model, options) for role, model in config.models.items()}
        model_config = read_model_config(checkpoints["reasoning"])
        trust = options.trust_remote_code
        model = empty_model(model_config, torch.float32, trust_remote_code=trust)
        self._tensors = {role: ModelTensors(one, model) for role, one in checkpoints.items()}
        reasoning = self._tensors["reasoning"]
        self._missing = left_out(reasoning, merge_names(model_config, reasoning))
        self._config = config
        if self._missing:
            strength_of(config.text)

    def write(self, folder: Path) -> tuple[str, ...]:
        """Write the missing tensors into a further shard of `folder`; returns their names."""
        if self._missing:
            calibration = CalibrationFile.open(str(self._config.calibration))
            merge = _Merge(calibration, self._tensors, self._config.text)
            tensors = {_stored_name(n, p): merge.tensor(n) for n, p in self._missing.items()}
            _add_shard(folder, tensors)
        return tuple(self._missing)


class _Merge:
    """Single tensors of the merge that a configuration describes."""

    def __init__(
        self,
        calibration: CalibrationFile,
        tensors: Mapping[str, ModelTensors],
        text: str,
    ) -> None:
        self._calibration, self._tensors = calibration, tensors
        self._strength = strength_of(text)
        settings: Mapping[str, Any] = yaml.safe_load(text)
        self._type = settings.get("out_dtype") or settings.get("dtype")
        self._method = RainMerge()

    def tensor(self, name: str) -> Tensor:
        weights = {role: tensors.get(name) for role, tensors in self._tensors.items()}
        plan = self._calibration.tensors.get(name)
        result = weights["reasoning"]
        if plan is not None and self._strength:
            trio = result, weights["instruct"], weights["pretrained"]
            result = self._method.merged(self._calibration, plan, trio, self._strength)
        for tensors in self._tensors.values():
            tensors.release()
        wanted = dtype_from_name(self._type) if self._type and plan is not None else result.dtype
        return result.to(wanted).contiguous()


def _stored_name(name: str, parts: tuple[str, ...]) -> str:
    return parts[0] if len(parts) == 1 else name


def _add_shard(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Give the shards new names and one more, and write the index that lists them all."""
    shards = sorted(folder.glob("model*.safetensors"))
    count = len(shards) + 1
    places: dict[str, str] = {}
    total = 0
    for number, shard in enumerate([*shards, None], start=1):
        goal = folder / f"model-{number:05d}-of-{count:05d}.safetensors"
        if shard is None:
            save_file(dict(tensors), goal, metadata={"format": "pt"})
        elif shard != goal:
            shard.rename(goal)
        with safe_open(goal, framework="pt") as file:
            places.update(dict.fromkeys(file.keys(), goal.name))
        total += goal.stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
