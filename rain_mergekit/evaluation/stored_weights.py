"""Weights by the names of a calibration file, whatever layout a checkpoint has them in."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.site_names import locate, module_order
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.empty_model import empty_model
from rain_mergekit.models.loading import read_model_config
from rain_mergekit.models.model_tensors import ModelTensors

# By kind of weight (`mlp.experts.*.up_proj`) and layer, the names of the weights.
Groups = dict[tuple[str, int], list[str]]


class CheckpointWeights:
    """A checkpoint's tensors as they are stored, or as transformers would convert them.

    Experts may be stored one by one in one model and as a single tensor in another.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @cached_property
    def _converted(self) -> ModelTensors:
        config, trust = read_model_config(self.checkpoint), self.checkpoint.trust_remote_code
        return ModelTensors.of(
            self.checkpoint, empty_model(config, torch.float32, trust_remote_code=trust)
        )

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint.names or name in self._converted.sources

    def get(self, name: str) -> Tensor:
        """One tensor on the CPU; RainError names the model if it is missing or broken."""
        whole = name in self.checkpoint.names
        return self.checkpoint.get(name) if whole else self._converted.get(name)


def grouped(file: CalibrationFile) -> Groups:
    """The listed weights by kind and layer; experts of a layer that are stored apart are one.

    What is in no layer comes as one more after the last.
    """
    found: Groups = {}
    places = {name: locate(name.removesuffix(".weight")) for name in file.tensors}
    end = max((layer + 1 for layer, _ in places.values() if layer is not None), default=0)
    for name, (layer, kind) in places.items():
        found.setdefault((kind, end if layer is None else layer), []).append(name)
    return dict(sorted(found.items(), key=lambda item: (module_order(item[0][0]), item[0][1])))


def short_names(kinds: Iterable[str]) -> dict[str, str]:
    """A short unique name for each kind: `up_proj`, or `experts.up_proj`."""
    parts = {kind: [part for part in kind.split(".") if part != "*"] for kind in kinds}
    return {kind: _ending(kind, parts) for kind in parts}


def _ending(kind: str, parts: dict[str, list[str]]) -> str:
    own = parts[kind]
    # Experts keep `experts.` in their name even if `up_proj` alone is unique.
    least = 2 if "experts" in own[:-1] else 1
    for length in range(least, len(own) + 1):
        if sum(other[-length:] == own[-length:] for other in parts.values()) == 1:
            return ".".join(own[-length:])
    return kind
