"""The weights of a merge before they were rounded to the type that they are stored in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.config.merge_config import read_recipe
from rain_mergekit.dequantize.plain_view import plain_view
from rain_mergekit.evaluation.comparable import check_reasoning
from rain_mergekit.merge_method.single_tensors import TensorMerger
from rain_mergekit.models.loading import LoadOptions, open_model, read_model_config
from rain_mergekit.models.merge_names import merge_names
from rain_mergekit.models.model_tensors import ModelTensors


class _Merged(ModelTensors):
    """The reasoning model's tensors; what the merge changes outside of layers is merged.

    That is made once and kept: one float32 matrix of the size of the output head.
    """

    def __init__(self, layerwise: LayerwiseModel, merger: TensorMerger) -> None:
        own = layerwise.tensors
        super().__init__(own.checkpoint, layerwise.model, own.expected, own.sources)
        self._merger, self._made = merger, dict[str, Tensor]()

    def get(self, name: str) -> Tensor:
        if not self._merger.of_tokens(name):
            return super().get(name)
        if name not in self._made:
            self._made[name] = self._merger.tensor(name, torch.float32)
        return self._made[name]


class Unrounded:
    """W_R + lambda (S_row Delta S_col)(I - U V^T) in float32, layer by layer.

    From the configuration that mergekit leaves in a merged model's folder and the calibration file
    that it names; `layerwise` is the reasoning model, whose embedding and output head are merged
    from then on. RainError says what is missing for it.
    """

    def __init__(self, merger: TensorMerger) -> None:
        self._merger = merger

    @classmethod
    def of(cls, folder: str, layerwise: LayerwiseModel, options: LoadOptions) -> Unrounded:
        """Open the models and the calibration that the configuration in `folder` names."""
        config = read_recipe(folder)
        strength = config.one_strength
        calibration = CalibrationFile.open(config.calibration)
        check_reasoning(calibration, layerwise.checkpoint)
        tensors = {
            role: ModelTensors.of(
                plain_view(open_model(config.models[role], options)), layerwise.model
            )
            for role in ("instruct", "pretrained")
        }
        names = merge_names(read_model_config(layerwise.checkpoint), layerwise.tensors)
        trio = {"reasoning": layerwise.tensors, **tensors}
        merger = TensorMerger(calibration, trio, names, strength)
        layerwise.tensors = _Merged(layerwise, merger)
        return cls(merger)

    def fill(self, layer: nn.Module, prefix: str) -> None:
        """Put the merged weights in place of a filled layer's; `prefix` is the layer's name."""
        for name, parameter in layer.named_parameters():
            whole = f"{prefix}.{name}"
            if self._merger.listed(whole):
                parameter.data = self._merger.tensor(whole, torch.float32, parameter.device)
        self._merger.release()
