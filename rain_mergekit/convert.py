"""A calibration file with coefficients from elsewhere: same protection, other scales."""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rain_mergekit.artifact import CalibrationFile, write_calibration
from rain_mergekit.artifact_schema import TensorPlan
from rain_mergekit.coefficients import expand_key_value, expand_query
from rain_mergekit.errors import RainError
from rain_mergekit.published_alpha import Alpha
from rain_mergekit.sites import locate

_KEY_VALUE = ("k_proj", "v_proj")
_FFN = ("gate_proj", "up_proj", "down_proj")


def with_coefficients(
    file: CalibrationFile, alpha: Alpha, source: str, out: str | Path
) -> list[int]:
    """Write `file` to `out` with these coefficients as its scales; the layers that have none.

    Scales come before the projection, so what is protected stays protected. RainError if a tensor
    of the file is no attention or MLP projection with whole heads.
    """
    header = {**file.header, "tensors": dict(file.header["tensors"])}
    replaced = {key for plan in file.tensors.values() for key in (plan.rows, plan.cols) if key}
    stored: dict[str, Any] = {
        key: partial(file.tensor, key) for key in sorted({*file.keys()} - replaced)
    }
    head_dim = _head_dim(file, alpha)
    layers = set()
    for name, plan in file.tensors.items():
        layer, kind = locate(name.removesuffix(".weight"))
        layers.add(layer or 0)
        axis, scale = _scale(name, kind.split(".")[-1], plan, alpha, layer or 0, head_dim)
        key = f"scale.{name}"
        stored[key] = scale.to(torch.float32).contiguous()
        entry = {**header["tensors"][name], "rows": None, "cols": None, axis: key}
        header["tensors"][name] = entry
    header["layers"] = [_layer(item, alpha, stored) for item in header.get("layers") or []]
    digest = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    remark = f"the coefficients are those of {os.path.basename(source)} (SHA-256 {digest})"
    header["warnings"] = [*(header.get("warnings") or []), remark]
    write_calibration(out, header, stored)
    return sorted(layers - set(alpha.layers))


def _head_dim(file: CalibrationFile, alpha: Alpha) -> int:
    sizes = {p.shape[-2] for n, p in file.tensors.items() if n.endswith("q_proj.weight")}
    if len(sizes) != 1 or next(iter(sizes)) % alpha.heads:
        raise RainError(
            f"{file.path}: its q_proj have {sorted(sizes)} rows, expected one number that "
            f"{alpha.heads} heads share: the coefficients are of another model"
        )
    return int(sizes.pop()) // alpha.heads


def _scale(
    name: str, module: str, plan: TensorPlan, alpha: Alpha, layer: int, head_dim: int
) -> tuple[str, Tensor]:
    """The axis and its factors: one a row, for o_proj one a column."""
    rows, columns = plan.shape[-2], plan.shape[-1]
    heads = range(alpha.heads)
    mean = torch.tensor([alpha.head(layer, head) for head in heads], dtype=torch.float64)
    if module in _FFN:
        return "rows", torch.full((rows,), alpha.layer(layer), dtype=torch.float64)
    if module == "o_proj":
        axis, scale, size = "cols", expand_query(mean, head_dim), columns
    elif module == "q_proj":
        axis, scale, size = "rows", expand_query(_row(alpha, "query", layer), head_dim), rows
    elif module in _KEY_VALUE and rows % head_dim == 0 and alpha.heads % (rows // head_dim) == 0:
        values = _row(alpha, "key", layer) if module == "k_proj" else mean
        axis, size = "rows", rows
        scale = expand_key_value(values, rows // head_dim, head_dim)
    else:
        axis, scale, size = "rows", torch.empty(0), rows
    if scale.numel() != size:
        raise RainError(f"{name}: no coefficient of the published scripts belongs to this weight")
    return axis, scale


def _row(alpha: Alpha, which: str, layer: int) -> Tensor:
    table = alpha.query if which == "query" else alpha.key
    found = [table.get((layer, head), 0.0) for head in range(alpha.heads)]
    return torch.tensor(found, dtype=torch.float64)


def _layer(item: dict[str, Any], alpha: Alpha, stored: dict[str, Any]) -> dict[str, Any]:
    """Show the new coefficients in reports, in place of the old ones."""
    layer = locate(item["name"])[0] or 0
    key = f"alpha.{item['name']}"
    stored[key] = torch.tensor([alpha.head(layer, head) for head in range(alpha.heads)])
    return {**item, "stats": {**item["stats"], "alpha": key}}
