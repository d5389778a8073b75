"""What a calibration reads of a model's decoder layers, by name."""

from __future__ import annotations

from collections.abc import Sequence

from rain_mergekit.capture.layerwise_model import LayerwiseModel


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
    """The names of these tensors, or of their parts, in the checkpoint."""
    return [part for name in names for part, _ in model.tensors.sources[name].parts]
