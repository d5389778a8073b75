"""What of a calibration's tensors mergekit finds in a checkpoint, and what it leaves out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ModelReference
from transformers import AutoConfig

from rain_mergekit.calibration_file.reader import CalibrationFile

_LAYER = re.compile(r"\.\d+\.")


def added_later(calibration: CalibrationFile, opened: Mapping[str, Any]) -> set[str]:
    """Tensors of the reasoning model that mergekit leaves out, as it has no conversion for them."""
    index = opened.get("reasoning")
    if index is None or not index.is_safetensors:
        return set()
    absent = [name for name in calibration.tensors if name not in index.tensor_paths]
    left = set(absent) - stored_otherwise(index, absent) if absent else set()
    return left & _converted(index) if left else left


def _converted(index: Any) -> set[str]:
    """The tensors that transformers makes of what is stored; none where it cannot tell."""
    from rain_mergekit.models.checkpoint import Checkpoint  # noqa: PLC0415 - loads transformers
    from rain_mergekit.models.empty_model import empty_model  # noqa: PLC0415 - likewise
    from rain_mergekit.models.merge_names import has_table  # noqa: PLC0415 - likewise
    from rain_mergekit.models.model_tensors import ModelTensors  # noqa: PLC0415 - likewise

    config = AutoConfig.from_pretrained(index.base_path)
    if has_table(config):
        return set()  # mergekit requires what its table lists
    reference = ModelReference.model_validate({"model": {"path": str(index.base_path)}})
    stored = Checkpoint(reference, str(index.base_path), index)
    return set(ModelTensors.of(stored, empty_model(config, torch.float32)).sources)


def stored_otherwise(index: Any, names: Sequence[str]) -> set[str]:
    """The names that mergekit finds under an alias, or assembles from other tensors."""
    from rain_mergekit.models.merge_names import listed_names  # noqa: PLC0415 - loads transformers

    config = AutoConfig.from_pretrained(index.base_path)
    listed = listed_names(config) or {}
    keys = set(index.tensor_paths)
    aliased = {listed[key] for key in keys if key in listed}
    return {
        name
        for name in names
        if name in aliased
        or can_convert_checkpoint_keys(config.model_type, _of_the_layer(keys, name), name)
    }


def _of_the_layer(keys: set[str], name: str) -> set[str]:
    """Only keys of the same layer: matching all keys of a large model takes minutes."""
    layer = _LAYER.search(name)
    return keys if layer is None else {key for key in keys if layer[0] in key}
