"""Take over coefficients of the published scripts: same protection, other scales.

Their file `alpha_….json` has `alpha`, a list of numbers, and `axes_info.flat_index`: for each of
them its layer, its head, and what it scales (`QK`, or `Q` and `K` apart). The other modules' follow
from these: v and o take the head's (of Q and K the mean), the FFN the mean of the layer's heads.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.schema import TensorPlan
from rain_mergekit.calibration_file.site_names import locate
from rain_mergekit.calibration_file.writer import write_calibration
from rain_mergekit.errors import RainError
from rain_mergekit.linalg.coefficients import expand_key_value, expand_query
from rain_mergekit.system.json_samples import StrPath, read_json

_TYPES = {"QK": ("query", "key"), "Q": ("query",), "K": ("key",)}
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


@dataclass(frozen=True)
class Alpha:
    """One coefficient for each (layer, head); query and key are the same where they are coupled."""

    heads: int
    query: Mapping[tuple[int, int], float]
    key: Mapping[tuple[int, int], float]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have coefficients, in order."""
        return tuple(sorted({layer for layer, _ in (*self.query, *self.key)}))

    def head(self, layer: int, head: int) -> float:
        """The mean of the head's coefficients; 0 where it has none: it is not merged."""
        at = (layer, head)
        found = [table[at] for table in (self.query, self.key) if at in table]
        return fmean(found) if found else 0.0

    def layer(self, layer: int) -> float:
        """The mean over the layer's heads that have coefficients; 0 where none has."""
        heads = {h for at, h in (*self.query, *self.key) if at == layer}
        return fmean(self.head(layer, h) for h in heads) if heads else 0.0


def read_alpha(path: StrPath) -> Alpha:
    """Read the file; RainError names it, the field, and what was expected."""
    content = read_json(path)
    axes = content.get("axes_info") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(axes, dict):
        raise RainError(
            f"{path}: is no coefficient file of the published scripts: expected the .json of "
            "their second stage, with `alpha` and `axes_info`"
        )
    values, index = content.get("alpha"), axes.get("flat_index")
    if not isinstance(values, list) or not isinstance(index, list) or len(values) != len(index):
        raise RainError(
            f"{path}: `alpha` and `axes_info.flat_index` must be two lists of the same length"
        )
    tables: dict[str, dict[tuple[int, int], float]] = {"query": {}, "key": {}}
    for number, (value, entry) in enumerate(zip(values, index, strict=True)):
        place = _place(entry)
        if place is None or not _is_number(value) or not math.isfinite(value):
            raise RainError(
                f"{path}: entry {number} must be a finite number with its layer, head, and QK, Q "
                f"or K, found {value!r:.40} and {entry!r:.60}"
            )
        for table in _TYPES[place[2]]:
            tables[table][place[:2]] = float(value)
    if not values:
        raise RainError(f"{path}: it holds no coefficients")
    return Alpha(1 + max(head for table in tables.values() for _, head in table), **tables)


def _place(entry: object) -> tuple[int, int, str] | None:
    if not isinstance(entry, list) or len(entry) != 3 or str(entry[2]) not in _TYPES:
        return None
    whole = [x for x in entry[:2] if _is_number(x) and 0 <= x < 10**5 and x == int(x)]
    return (int(whole[0]), int(whole[1]), str(entry[2])) if len(whole) == 2 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
