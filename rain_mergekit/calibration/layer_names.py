"""What a calibration reads of a model's decoder layers, by name, and what identifies a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import rain_mergekit
from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.samples import Samples, record
from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.models.loading import Trio
from rain_mergekit.models.tokenizer import tokenizer_digest
from rain_mergekit.system import blas_mode
from rain_mergekit.system.distributed import World


def matrix_names(model: LayerwiseModel) -> list[str]:
    """All weights of the decoder layers that may multiply features."""
    return [
        f"{model.prefix}.{index}.{name}"
        for index, layer in enumerate(model.layers)
        for name, parameter in layer.named_parameters()
        if parameter.dim() > 1
    ]


def layer_shapes(model: LayerwiseModel) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that filling a layer takes from the checkpoint, by name."""
    return {
        f"{model.prefix}.{index}.{name}": tuple(tensor.shape)
        for index, layer in enumerate(model.layers)
        for name, tensor in layer.state_dict().items()
        if tensor.is_meta
    }


def stored_names(model: LayerwiseModel, names: Sequence[str]) -> list[str]:
    """What the checkpoint calls these tensors, or their parts."""
    return [part for name in names for part, _ in model.tensors.sources[name].parts]


def run_identity(
    model: LayerwiseModel,
    trio: Trio,
    samples: Samples,
    settings: RainSettings,
    options: RunOptions,
    world: World,
    models: Mapping[str, Any],
) -> dict[str, Any]:
    """What must be equal for an interrupted run to be continued."""
    identity = {
        "version": rain_mergekit.__version__,
        "models": models,
        "tokenizer": tokenizer_digest(trio.reasoning.path),
        "data": record(samples),
        "settings": settings.numbers(),
        "dtype": str(model.dtype),
        "device": torch.device(options.device).type,
        "processes": world.size,
    }
    if options.deterministic:
        identity["deterministic"] = blas_mode.mode()  # which changes the bits of products
    return identity
