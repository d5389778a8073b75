"""Add the tensors that stock mergekit omits to a merged model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from mergekit.common import dtype_from_name
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.config.merge_config import RainConfig
from rain_mergekit.errors import RainError
from rain_mergekit.linalg.finite import finite
from rain_mergekit.merge_method.single_tensors import TensorMerger
from rain_mergekit.models.empty_model import empty_model
from rain_mergekit.models.loading import LoadOptions, open_model, read_model_config
from rain_mergekit.models.merge_names import left_out, merge_names
from rain_mergekit.models.model_tensors import ModelTensors

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
        self._names = merge_names(model_config, self._tensors["reasoning"])
        self._missing = left_out(self._tensors["reasoning"], self._names)
        self._calibration = str(config.calibration)
        if self._missing:
            self._strength(config)

    def _strength(self, config: RainConfig) -> float:
        try:
            return config.one_strength
        except RainError as error:
            raise RainError(
                f"{error}: mergekit leaves out {len(self._missing)} tensors of this model "
                f"({next(iter(self._missing))}, ...), which are added with one lambda for all"
            ) from None

    def write(self, folder: Path, config: RainConfig) -> tuple[str, ...]:
        """Write the missing tensors of the merge `config` into a further shard of `folder`.

        Returns their names. Of `config` only lambda and the types count here, which may differ
        from those given first.
        """
        if self._missing:
            tensors = {_stored_name(n, p): t for n, p, t in self._merged(config)}
            _add_shard(folder, tensors)
        return tuple(self._missing)

    def _merged(self, config: RainConfig) -> Iterator[tuple[str, tuple[str, ...], Tensor]]:
        calibration = CalibrationFile.open(self._calibration)
        replay = TensorMerger(calibration, self._tensors, self._names, self._strength(config))
        dtype, stored = _type(config.merge.dtype), _type(config.merge.out_dtype)
        for name, parts in self._missing.items():
            # what the merge leaves alone keeps its type, e.g. the float32 biases of routers
            changed = replay.listed(name)
            tensor = replay.tensor(name, dtype if changed else None)
            if changed and stored is not None:
                tensor = tensor.to(stored)
            if not finite(tensor):
                raise RainError(f"{name} holds NaN or infinite values in the result")
            yield name, parts, tensor.contiguous()
            replay.release()


def _type(name: str | None) -> torch.dtype | None:
    return None if name is None else dtype_from_name(name)


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
