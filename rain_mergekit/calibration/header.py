"""The header of a calibration file, as it is written; docs/calibration-file.md describes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import rain_mergekit
from rain_mergekit.config.method_names import RAIN
from rain_mergekit.config.roles import is_proxy
from rain_mergekit.config.settings import RainSettings


@dataclass(frozen=True)
class RunRecord:
    """How the file was made.

    Attributes:
        dtype: of the forward pass.
        device: its kind, `cpu` or `cuda`.
        tokenizer: digests of the parts of the reasoning model's tokenizer.
        likelihood: how likely the reasoning model finds the markers on its own set.
        deterministic: whether the same bits were asked for, whatever the number of threads.
    """

    dtype: torch.dtype
    device: str
    tokenizer: Any
    likelihood: Mapping[str, float | None]
    deterministic: bool

    def to_json(self) -> dict[str, Any]:
        """The entry `run`."""
        entry = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device,
            "tokenizer": self.tokenizer,
            "likelihood": dict(self.likelihood),
        }
        return {**entry, "deterministic": True} if self.deterministic else entry


@dataclass(frozen=True)
class Origin:
    """What the file was made from.

    Attributes:
        method: the merge method that the file is for.
        models: reference, revision and fingerprint of each model, by role.
        data: path, digest and counts of both sets, and the markers.
        settings: the `rain:` section, with all defaults.
        run: how the calibration ran.
    """

    method: str
    models: Mapping[str, Any]
    data: Mapping[str, Any]
    settings: RainSettings
    run: RunRecord

    @property
    def gamma(self) -> float:
        """gamma, or 0 where it does nothing: the reasoning model stands for the pretrained one."""
        proxy = is_proxy({role: str(one["reference"]) for role, one in self.models.items()})
        return 0.0 if proxy else self.settings.gamma


@dataclass(frozen=True)
class CalibrationHeader:
    """All that the file says besides its tensors.

    Attributes:
        origin: models, data, settings, and how the calibration ran.
        untouched: weights of the layers that stay as they are, such as routers and convolutions.
        warnings: what the user should know.
        sites: width, rank and keys of each input site, by name.
        tensors: site, shape and keys of each weight, by name.
        layers: coefficients of the attention heads, one entry a layer that has them.
        streams: errors of stream matching, one entry a layer; empty for the projection.
    """

    origin: Origin
    untouched: Sequence[str]
    warnings: Sequence[str]
    sites: Mapping[str, Any]
    tensors: Mapping[str, Any]
    layers: Sequence[Any]
    streams: Sequence[Any]

    def to_json(self) -> dict[str, Any]:
        """The header as JSON has it."""
        header = {
            "created_by": f"rain_mergekit {rain_mergekit.__version__}",
            **({} if self.origin.method == RAIN else {"kind": self.origin.method}),
            **({"gamma": self.origin.gamma} if self.origin.gamma else {}),
            "models": self.origin.models,
            "data": self.origin.data,
            "settings": self.origin.settings.model_dump(mode="json"),
            "run": self.origin.run.to_json(),
            "untouched": list(self.untouched),
            "warnings": list(self.warnings),
            "sites": self.sites,
            "tensors": self.tensors,
            "layers": list(self.layers),
        }
        return {**header, "streams": {"layers": list(self.streams)}} if self.streams else header
