"""What of a calibration's tensors mergekit finds in a checkpoint, and what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mergekit.common import ModelReference
from transformers import AutoConfig

from rain_mergekit.calibration_file.reader import CalibrationFile


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
    """Of names that are not stored, those that mergekit finds by an alias or a conversion."""
    from rain_mergekit.models.merge_names import (  # noqa: PLC0415 - loads transformers
        Found,
        listed_names,
    )

    config = AutoConfig.from_pretrained(index.base_path)
    listed = listed_names(config) or {}
    aliased = {listed[key] for key in index.tensor_paths if key in listed}
    found = Found.of(index.tensor_paths, config.model_type)
    return {name for name in names if name in aliased or found(name)}
