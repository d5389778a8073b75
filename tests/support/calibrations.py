"""Calibration files made by hand: a layer count, a rank, and what the header says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rain_mergekit.calibration_file.writer import write_calibration

WIDTH, RANK, HEADS = 12, 3, 4
SITES = {
    "self_attn.q_proj": ("q_proj", "k_proj", "v_proj"),
    "mlp.down_proj": ("down_proj",),
}


def header(layers: int, *, references: dict[str, str] | None = None) -> dict[str, Any]:
    """The parts that a calibration records beside its tensors."""
    roles = {role: f"org/{role}" for role in ("reasoning", "instruct", "pretrained")}
    named = {**roles, **(references or {})}
    return {
        "created_by": "by hand",
        "models": {
            role: {"reference": reference, "revision": None, "fingerprint": None}
            for role, reference in named.items()
        },
        "data": {
            "reasoning": {
                "path": "reasoning.jsonl",
                "sha256": "ab" * 32,
                "total": 9,
                "used": 8,
                "skipped": 1,
                "positions": 80,
            },
            "instruction": None,
        },
        "settings": {"reasoning_data": "r", "rank_by": "response_energy", "max_rank": RANK},
        "sites": {},
        "tensors": {},
        "layers": [{"name": f"model.layers.{i}", "stats": {}} for i in range(layers)],
        "warnings": [],
    }


def write(path: Path, depth: int = 12, *, heads: bool = True, **changes: Any) -> Path:
    """A file with two kinds of sites; `changes` replace parts of the header."""
    made, stored = header(depth), {}
    for index in range(depth):
        for site, modules in SITES.items():
            name = f"model.layers.{index}.{site}"
            made["sites"][name] = _site(name, index, stored)
            for module in modules:
                made["tensors"][f"{name.rpartition('.')[0]}.{module}.weight"] = {
                    "site": name,
                    "shape": [WIDTH, WIDTH],
                    "input_axis": -1,
                    "rows": None,
                    "cols": None,
                }
        if heads:
            made["layers"][index]["stats"] = _statistics(index, stored)
    write_calibration(path, {**made, **changes}, stored)
    return path


def _site(name: str, index: int, stored: dict[str, torch.Tensor]) -> dict[str, Any]:
    energies = torch.logspace(2, -6, WIDTH)
    stored[f"u.{name}"] = torch.linalg.qr(torch.randn(WIDTH, RANK))[0].contiguous()
    stored[f"spectrum.{name}"] = energies
    stored[f"response.{name}"] = energies.roll(1)  # the smallest direction matters most
    return {
        "width": WIDTH,
        "rank": RANK,
        "u": f"u.{name}",
        "v": None,
        "kept_energy": 0.9 + 0.001 * index,
        "kept_response_energy": 0.99,
        "capped": index == 0,
        "spectrum": f"spectrum.{name}",
        "response_energy": f"response.{name}",
    }


def _statistics(index: int, stored: dict[str, torch.Tensor]) -> dict[str, str]:
    keys = {name: f"{name}.{index}" for name in ("alignment", "leakage", "alpha")}
    for shift, key in enumerate(keys.values()):
        stored[key] = torch.linspace(0.1, 1.0, HEADS) + shift * 0.1 + index * 0.01
    return keys
