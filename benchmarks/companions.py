"""`python -m benchmarks.companions`: what the companion methods cost beside task arithmetic.

A random trio of the given width is merged in forks of a process that has imported everything, the
methods in turn. Prints the medians' ratios. Peak memory is the whole process's; processor time is
what a busy machine does not blur.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from safetensors import safe_open

from benchmarks.merging import Cost, forked_merge
from benchmarks.shapes import Shape, make_trio
from rain_mergekit.calibration_file.writer import write_calibration

BASE = "task_arithmetic"
METHODS: dict[str, dict[str, Any]] = {
    BASE: {"weight": 1.0, "lambda": 0.7},
    "ties": {"weight": 1.0, "density": 0.6},
    "opcm": {},
    "pcb": {},
    "wudi": {},
    "aim": {},
}


def main() -> None:
    options = arguments()
    shape = Shape(hidden=options.hidden, ffn=4 * options.hidden, layers=options.layers)
    with tempfile.TemporaryDirectory(prefix="rain-companions-") as folder:
        home = Path(folder)
        make_trio(home, shape)
        METHODS["aim"]["calibration"] = str(channels(home))
        wanted = [BASE, *(method for method in options.methods if method != BASE)]
        for method in wanted:
            parameters = METHODS[method]
            (home / f"{method}.yml").write_text(yaml.safe_dump(config(home, method, parameters)))
        found = measured(home, wanted, options.repeats)
    base = found[BASE]
    print(f"width {shape.hidden}, {shape.layers} layers, {shape.model_bytes / 2**20:.0f} MiB")
    for method, cost in found.items():
        ratios = (f"{name} {cost[name] / base[name]:.2f}" for name in base)
        print(f"{method:16} {cost['seconds']:.2f} s, beside task_arithmetic: {', '.join(ratios)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    return parser.parse_args()


def config(home: Path, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    others = [{"model": str(home / role)} for role in ("reasoning", "instruct")]
    return {
        "merge_method": method,
        "base_model": str(home / "pretrained"),
        "models": others,
        "parameters": parameters,
        "dtype": "bfloat16",
    }


def channels(home: Path) -> Path:
    """A calibration for aim with random scales, of every linear map in the layers."""
    index = json.loads((home / "pretrained" / "model.safetensors.index.json").read_text())
    tensors, stored = {}, {}
    for name, file in index["weight_map"].items():
        if "_proj.weight" in name:
            with safe_open(home / "pretrained" / file, "pt") as opened:
                size = opened.get_slice(name).get_shape()
            stored[name] = torch.rand(size[1])
            entry = {"site": None, "shape": size, "input_axis": -1, "rows": None, "cols": name}
            tensors[name] = entry
    record = {"reference": "random", "revision": None, "fingerprint": None}
    models = dict.fromkeys(("reasoning", "instruct", "pretrained"), record)
    header = {"kind": "aim", "models": models, "sites": {}, "tensors": tensors}
    write_calibration(home / "c.aim.safetensors", header, stored)
    return home / "c.aim.safetensors"


def measured(home: Path, methods: Sequence[str], repeats: int) -> dict[str, Cost]:
    """The medians of each method; every turn goes through all of them."""
    runs: dict[str, list[Cost]] = {method: [] for method in methods}
    for _ in range(repeats):
        for method, costs in runs.items():
            costs.append(forked_merge(home, method))
    return {
        method: {key: median(cost[key] for cost in costs) for key in costs[0]}
        for method, costs in runs.items()
    }


if __name__ == "__main__":
    main()
