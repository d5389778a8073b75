"""The result of one calibrated layer, as a small safetensors file of its own."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from rain_mergekit.calibration.aim_site import channel_scale, taken_back
from rain_mergekit.calibration.layer import LayerResult
from rain_mergekit.calibration.site_solver import SiteResult
from rain_mergekit.capture.input_sites import LinearWeight, dotted
from rain_mergekit.linalg.coefficients import HeadStatistics
from rain_mergekit.models.head_layout import HeadLayout
from rain_mergekit.system.atomic_file import replacing
from rain_mergekit.system.profile import WRITE, phase

STORED_DTYPE = torch.float32
TOKENS = "tokens"  # the key of the rows that are merged, where rows are tokens


@dataclass(frozen=True)
class LayerResultFile:
    """One layer read back: header entries, statistics, and the keys of the tensors in the file.

    streams: of a layer of stream matching, its name and the errors by group of tokens.
    """

    path: Path
    name: str
    sites: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Any]]
    statistics: HeadStatistics | None
    layout: HeadLayout | None
    keys: tuple[str, ...]
    streams: dict[str, Any] | None = None

    def read(self, key: str) -> Tensor:
        """One tensor of the calibration file."""
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor


def write_part(path: Path, name: str, result: LayerResult) -> None:
    """Write the results of layer `name` (e.g. model.layers.3, or nothing for the model itself).

    Entries are by module names.
    """
    stored: dict[str, Tensor] = {}
    sites = {
        dotted(name, site): _site(dotted(name, site), solved, stored)
        for site, solved in result.solved.items()
        if solved.channels is None
    }
    tensors = {dotted(name, w.name): _tensor(name, w) for w in result.sites.weights.values()}
    for weight in result.sites.weights.values():
        solved = [result.solved[site] for site in weight.sites]
        if solved[0].channels is not None:
            key = f"channels.{dotted(name, weight.sites[0])}"
            if key not in stored:  # weights that share their input share its scale
                stored[key] = channel_scale(solved).to(STORED_DTYPE)
            tensors[dotted(name, weight.name)] |= {
                "site": None,
                "cols": key,
                "tokens_seen": sum(one.positions for one in solved),
                "taken_back": taken_back(stored[key]),
            }
    if result.tokens is not None:
        stored[TOKENS] = result.tokens.to("cpu", STORED_DTYPE)
        for entry in tensors.values():
            entry |= {"rows": TOKENS, "tokens": True}
    keys = tuple(stored)
    if result.statistics is not None:
        stored["alignment"] = result.statistics.alignment
        stored["leakage"] = result.statistics.leakage
    layout = None if result.layout is None else asdict(result.layout)
    header = {"name": name, "sites": sites, "tensors": tensors, "keys": keys, "heads": layout}
    with phase(WRITE), replacing(path) as out:
        out.write(save(stored, metadata={"layer": json.dumps(header)}))


def read_part(path: Path) -> LayerResultFile:
    """Read back what `write_part` wrote; factors stay on disk."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["layer"])
        statistics = None
        if "alignment" in file.keys():  # noqa: SIM118 - a file, not a mapping
            alignment, leakage = file.get_tensor("alignment"), file.get_tensor("leakage")
            statistics = HeadStatistics(alignment, leakage)
    layout = None if header["heads"] is None else HeadLayout(**header["heads"])
    return LayerResultFile(
        path=path,
        name=header["name"],
        sites=header["sites"],
        tensors=header["tensors"],
        statistics=statistics,
        layout=layout,
        keys=tuple(header["keys"]),
        streams=header.get("streams"),
    )


def _tensor(layer: str, weight: LinearWeight) -> dict[str, Any]:
    own = [dotted(layer, site) for site in weight.sites]
    return {
        "site": own if len(own) > 1 else own[0],
        "shape": list(weight.shape),
        "input_axis": weight.input_axis,
        "rows": None,
        "cols": None,
    }


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
        **{kind: None if tensor is None else key for kind, (key, tensor) in keys.items()},
    }
