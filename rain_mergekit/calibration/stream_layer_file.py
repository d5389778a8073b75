"""What one layer of stream matching contributes, as a small safetensors file of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from rain_mergekit.calibration.layer_file import STORED_DTYPE
from rain_mergekit.calibration.stream_layer import StreamLayerResult
from rain_mergekit.capture.input_sites import dotted
from rain_mergekit.linalg.ridge_solver import LowRankChange
from rain_mergekit.system.atomic_file import replacing
from rain_mergekit.system.profile import WRITE, phase


def write_stream_layer(path: Path, name: str, result: StreamLayerResult) -> None:
    """Write the results of layer `name` (e.g. model.layers.3); `layer_file.read_part` reads it."""
    stored: dict[str, Tensor] = {}
    tensors = {
        dotted(name, weight): _entry(dotted(name, weight), weight, result, stored)
        for weight, change in result.changes.items()
        if change.rank
    }
    header = {
        "name": name,
        "sites": {},
        "tensors": tensors,
        "keys": tuple(stored),
        "heads": None,
        "streams": {"name": name, "fitted": result.fitted, "held_out": result.held_out},
    }
    with phase(WRITE), replacing(path) as out:
        out.write(save(stored, metadata={"layer": json.dumps(header)}))


def _entry(
    name: str, weight: str, result: StreamLayerResult, stored: dict[str, Tensor]
) -> dict[str, Any]:
    change = result.changes[weight]
    keys = {"a": f"change.{name}.a", "b": f"change.{name}.b"}
    for kind, tensor in (("a", change.a), ("b", change.b)):
        stored[keys[kind]] = tensor.to("cpu", STORED_DTYPE).contiguous()
    return {
        "site": None,
        "shape": list(result.shapes[weight]),
        "input_axis": result.input_axes[weight],
        "rows": None,
        "cols": None,
        **keys,
        "fit": _fit(change),
    }


def _fit(change: LowRankChange) -> dict[str, Any]:
    return {
        "rank": change.rank,
        "wanted": change.wanted,
        "explained": change.explained,
        "fitted": change.fitted,
        "epsilon": change.epsilon,
    }
