"""What one layer of stream matching contributes, as a small safetensors file of its own."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from rain_mergekit.calibration.layer_experts import ExpertChange
from rain_mergekit.calibration.layer_file import STORED_DTYPE, TOKENS
from rain_mergekit.calibration.lm_head import HeadWeight
from rain_mergekit.calibration.stream_result import StreamLayerResult
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
        if change.rank or weight in result.starts
    }
    for weight, experts in result.expert_changes.items():
        tensors[dotted(name, weight)] = _of_experts(dotted(name, weight), experts, stored)
    header = {
        "name": name,
        "sites": {},
        "tensors": tensors,
        "keys": tuple(stored),
        "heads": None,
        "streams": {
            "name": name,
            "fitted": result.fitted,
            "held_out": result.held_out,
            **({"experts": _experts(result)} if result.experts else {}),
        },
    }
    with phase(WRITE), replacing(path) as out:
        out.write(save(stored, metadata={"layer": json.dumps(header)}))


def write_stream_head(path: Path, head: HeadWeight, rows: Tensor, change: LowRankChange) -> None:
    """Write the change of the output head, under all of its names; `read_part` reads it.

    rows: which tokens' rows are changed, (vocabulary) bool.
    """
    stored: dict[str, Tensor] = {TOKENS: rows.to("cpu", STORED_DTYPE)}
    entry = _plain(head.shape, -1) | _change(head.name, change, stored)
    entry |= {"rows": TOKENS, "tokens": True}
    header = {
        "name": "",
        "sites": {},
        "tensors": {name: entry for name in (head.name, *head.more) if change.rank},
        "keys": tuple(stored) if change.rank else (),
        "heads": None,
    }
    with phase(WRITE), replacing(path) as out:
        out.write(save(stored, metadata={"layer": json.dumps(header)}))


def _entry(
    name: str, weight: str, result: StreamLayerResult, stored: dict[str, Tensor]
) -> dict[str, Any]:
    entry = _plain(result.shapes[weight], result.input_axes[weight])
    if weight in result.starts:
        entry["start"] = result.starts[weight]
    change = result.changes[weight]
    return entry | (_change(name, change, stored) if change.rank else {"fit": _fit(change)})


def _of_experts(name: str, experts: ExpertChange, stored: dict[str, Tensor]) -> dict[str, Any]:
    """The entry of a weight that holds all experts, with factors of each that has some."""
    found = {
        str(expert): _change(f"{name}.{expert}", change, stored)
        for expert, change in experts.changes.items()
    }
    return {**_plain(experts.shape, experts.input_axis), "experts": found}


def _plain(shape: tuple[int, ...], axis: int) -> dict[str, Any]:
    """The entry of a weight of which nothing is projected or scaled."""
    return {"site": None, "shape": list(shape), "input_axis": axis, "rows": None, "cols": None}


def _change(name: str, change: LowRankChange, stored: dict[str, Tensor]) -> dict[str, Any]:
    keys = {"a": f"change.{name}.a", "b": f"change.{name}.b"}
    for kind, tensor in (("a", change.a), ("b", change.b)):
        stored[keys[kind]] = tensor.to("cpu", STORED_DTYPE).contiguous()
    return {**keys, "fit": _fit(change)}


def _experts(result: StreamLayerResult) -> dict[str, Any]:
    """What became of each expert, by module: tokens of each, and those that stay as they are."""
    return {name: asdict(found) for name, found in result.experts.items()}


def _fit(change: LowRankChange) -> dict[str, Any]:
    return {
        "rank": change.rank,
        "wanted": change.wanted,
        "explained": change.explained,
        "fitted": change.fitted,
        "epsilon": change.epsilon,
    }
