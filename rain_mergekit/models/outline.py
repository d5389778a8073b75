"""A model without its weights: modules on the meta device, and how large its files are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from rain_mergekit.errors import RainError
from rain_mergekit.models.config_file import read_config
from rain_mergekit.models.empty_model import decoder_layers, empty_model, text_config
from rain_mergekit.models.published_format import PublishedFormat, format_of
from rain_mergekit.system.untrusted_input import first_line


@dataclass(frozen=True)
class ModelOutline:
    """What can be said of a model before a tensor of it is read.

    Attributes:
        config: of transformers.
        model: the modules without weights.
        layers: its decoder layers.
        hidden_size: d.
        bytes: what its weights take on disk; of a quantised model, as plain weights.
        quantised: the format in which it is published, if its weights are not plain.
    """

    config: Any
    model: nn.Module
    layers: nn.ModuleList
    hidden_size: int
    bytes: int
    quantised: PublishedFormat | None = None

    @property
    def parameters(self) -> int:
        """Number of weights; tied tensors count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def stored_itemsize(self) -> int:
        """Bytes a weight on disk, rounded."""
        return max(1, min(8, round(self.bytes / self.parameters)))


def outline_of(path: str) -> ModelOutline:
    """The outline of a model from its published `config.json`; no weights are needed.

    Their type is the one that the config names, or bfloat16.

    RainError if the file cannot be read, or transformers cannot build such a model.
    """
    values = read_config(Path(path))
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - transformers' classes of configs raise anything
        raise RainError(f"{path}: not a config that is known here: {first_line(error)}") from None
    model = empty_model(config, torch.bfloat16)
    layers, _ = decoder_layers(model, config)
    hidden = int(text_config(config).hidden_size)
    size = sum(parameter.numel() for parameter in model.parameters()) * _itemsize(values)
    return ModelOutline(config, model, layers, hidden, size, format_of(values, path))


def _itemsize(values: Mapping[str, Any]) -> int:
    parts = [values, *(part for part in values.values() if isinstance(part, dict))]
    named = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]
    dtype = next((getattr(torch, n, None) for n in named if isinstance(n, str)), None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else torch.bfloat16.itemsize
