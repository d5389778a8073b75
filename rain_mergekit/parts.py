"""What one finished layer contributes, as a small safetensors file of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from rain_mergekit.atomic import replacing
from rain_mergekit.coefficients import HeadStatistics
from rain_mergekit.solve import SiteResult
from rain_mergekit.walk import LayerResult

STORED_DTYPE = torch.float32


@dataclass(frozen=True)
class LayerPart:
    """One layer as read back: header entries, statistics, and which tensors lie in the file."""

    path: Path
    name: str
    sites: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Any]]
    statistics: HeadStatistics | None
    keys: tuple[str, ...]

    def read(self, key: str) -> Tensor:
        """One tensor of the calibration file."""
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor


def write_part(
    path: Path, name: str, result: LayerResult, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Write the results of layer `name` (e.g. model.layers.3); shapes are by module name."""
    stored: dict[str, Tensor] = {}
    sites = {
        f"{name}.{site}": _site(f"{name}.{site}", solved, stored)
        for site, solved in result.solved.items()
    }
    tensors = {
        f"{name}.{module}.weight": {
            "site": f"{name}.{site}",
            "shape": list(shapes[module]),
            "input_axis": -1,
            "rows": None,
            "cols": None,
        }
        for module, site in result.sites.site_of.items()
    }
    keys = tuple(stored)
    if result.statistics is not None:
        stored["alignment"] = result.statistics.alignment
        stored["leakage"] = result.statistics.leakage
    header = {"name": name, "sites": sites, "tensors": tensors, "keys": keys}
    with replacing(path) as out:
        out.write(save(stored, metadata={"layer": json.dumps(header)}))


def read_part(path: Path) -> LayerPart:
    """Read back what `write_part` wrote; factors stay on disk."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["layer"])
        statistics = None
        if "alignment" in file.keys():  # noqa: SIM118 - a file, not a mapping
            alignment, leakage = file.get_tensor("alignment"), file.get_tensor("leakage")
            statistics = HeadStatistics(alignment, leakage)
    keys = tuple(header["keys"])
    return LayerPart(path, header["name"], header["sites"], header["tensors"], statistics, keys)


def _site(name: str, solved: SiteResult, stored: dict[str, Tensor]) -> dict[str, Any]:
    rank = solved.rank
    oblique = solved.factors.v is not solved.factors.u
    keys = {
        "spectrum": (f"spectrum.{name}", solved.spectrum),
        "response_energy": (f"response.{name}", solved.energies),
        "u": (f"basis.{name}.u", solved.factors.u if rank else None),
        "v": (f"basis.{name}.v", solved.factors.v if rank and oblique else None),
    }
    for key, tensor in keys.values():
        if tensor is not None:
            stored[key] = tensor.to("cpu", STORED_DTYPE).contiguous()
    return {
        "width": solved.width,
        "rank": rank,
        "positions": solved.positions,
        "kept_energy": solved.kept_energy,
        "kept_response_energy": solved.kept_response_energy,
        "capped": solved.capped,
        "damping": None,
        **{kind: None if tensor is None else key for kind, (key, tensor) in keys.items()},
    }
