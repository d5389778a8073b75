"""Add the tensors that stock mergekit omits to a merged model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from mergekit.common import ModelReference, dtype_from_name
from torch import Tensor

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.config.merge_config import MergeRecipe
from rain_mergekit.dequantize.plain_view import plain_view
from rain_mergekit.errors import RainError
from rain_mergekit.linalg.finite import finite
from rain_mergekit.merge_method.checkpoint_layout import in_parts, is_restored, restore_layout
from rain_mergekit.merge_method.single_tensors import TensorMerger
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.empty_model import empty_model
from rain_mergekit.models.loading import (
    LoadOptions,
    merged_folders,
    open_models,
    read_model_config,
    require_all_layers,
)
from rain_mergekit.models.merge_names import Names, has_table, left_out, merge_names
from rain_mergekit.models.model_tensors import ModelTensors
from rain_mergekit.models.weight_files import add_tensors, tensor_names, write_index


class Completion:
    """The tensors that mergekit will omit, known before the merge; `write` adds them afterwards.

    Weights that the calibration covers are merged like all others, the rest are the reasoning
    model's. Afterwards all tensors are called and divided as in its checkpoint.
    """

    def __init__(
        self,
        calibration: str,
        tensors: Mapping[str, ModelTensors],
        names: Names,
        merged_adapters: Mapping[ModelReference, str],
    ) -> None:
        """merged_adapters: folders of models with an adapter that mergekit takes by these alone.

        It looks into the checkpoint where it has no table for the architecture, and has no way
        there to a merged adapter.
        """
        self._calibration, self._tensors, self._names = calibration, tensors, names
        self.merged_adapters = merged_adapters
        self.reasoning = tensors["reasoning"]

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Those of all roles."""
        return [tensors.checkpoint for tensors in self._tensors.values()]

    @cached_property
    def _missing(self) -> Mapping[str, tuple[str, ...]]:
        return left_out(self.reasoning, self._names)

    @classmethod
    def of(cls, config: MergeRecipe, options: LoadOptions) -> Completion:
        """Read the models' headers; RainError if lambda has to be one number and is not."""
        checkpoints = open_models(config, options, plain_view)
        model_config = read_model_config(checkpoints["reasoning"])
        require_all_layers(config, model_config)
        trust = options.trust_remote_code
        model = empty_model(model_config, torch.float32, trust_remote_code=trust)
        tensors = {role: ModelTensors.of(one, model) for role, one in checkpoints.items()}
        names = merge_names(model_config, tensors["reasoning"])
        adapters = {} if has_table(model_config) else merged_folders(checkpoints)
        completion = cls(str(config.calibration), tensors, names, adapters)
        completion._strength(config)
        return completion

    def _strength(self, config: MergeRecipe) -> float:
        """Lambda if one of the missing tensors is merged with it, else 0."""
        if not self._missing.keys() - self.reasoning.unknown:
            return 0.0
        try:
            return config.one_strength
        except RainError as error:
            raise RainError(
                f"{error}: mergekit leaves out {len(self._missing)} tensors of this model "
                f"({next(iter(self._missing))}, ...), which are added with one lambda for all"
            ) from None

    def to_do(self, folder: Path) -> bool:
        """Whether `write` would change anything in `folder`."""
        there = tensor_names(folder)
        return bool(self._absent(there)) or not is_restored(there, self.reasoning, self._names)

    def _absent(self, there: set[str]) -> dict[str, tuple[str, ...]]:
        return {
            name: parts
            for name, parts in self._missing.items()
            if name not in there and not there.issuperset(parts)
        }

    def write(self, folder: Path, config: MergeRecipe) -> tuple[str, ...]:
        """Write the missing tensors of the merge `config` into a further shard of `folder`.

        Returns their names. Of `config` only lambda and the types count here, which may differ
        from those given first. What is there already stays, so that it can be done again.
        """
        missing = self._absent(tensor_names(folder))
        if missing:
            add_tensors(folder, dict(self._merged(missing, config)))
        if restore_layout(folder, self.reasoning, self._names) or missing:
            write_index(folder)
        return tuple(missing)

    def _merged(
        self, missing: Mapping[str, tuple[str, ...]], config: MergeRecipe
    ) -> Iterator[tuple[str, Tensor]]:
        calibration = CalibrationFile.open(self._calibration)
        replay = TensorMerger(calibration, self._tensors, self._names, self._strength(config))
        dtype, stored = _type(config.merge.dtype), _type(config.merge.out_dtype)
        for name, parts in missing.items():
            # what the merge leaves alone keeps its type, e.g. the float32 biases of routers
            if not replay.listed(name):
                yield from self._copied(parts)
                continue
            tensor = replay.tensor(name, dtype)
            if stored is not None:
                tensor = tensor.to(stored)
            if not finite(tensor):
                raise RainError(f"{name} holds NaN or infinite values in the result")
            for part, value in in_parts(self.reasoning, name, tensor).items():
                yield part, value.contiguous()
            replay.release()

    def _copied(self, parts: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        """The tensors as they are in the reasoning model's checkpoint."""
        for part in parts:
            tensor = self.reasoning.checkpoint.get(part)
            if tensor.is_floating_point() and not finite(tensor):
                raise RainError(f"{part} holds NaN or infinite values in the result")
            yield part, tensor.contiguous()
        self.reasoning.release()


def _type(name: str | None) -> torch.dtype | None:
    return None if name is None else dtype_from_name(name)
