"""`bench/device.sh FOLDER`: random models of published shapes, written, calibrated and merged.

Every stage's result is kept in FOLDER/state.json, so that a run which ended at its deadline goes on
when it is started again; the calibration itself goes on after its last saved layer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.device_models import write_model
from benchmarks.device_shapes import ROLES, SHAPES, DeviceShape, write_configs, write_sets
from benchmarks.device_table import per_second, table
from rain_mergekit.errors import RainError
from rain_mergekit.system.loader_choice import LOADERS, MMAP, require_loader

REPOSITORY = Path(__file__).parents[1]
SECONDS = 460  # in all, with what a shell and the imports take: under eight minutes
_BLOCK, _AT_MOST = 16 * 1024**2, 8 * 1024**3
_SPARE = 2 * 1024**3  # of the disk, for everything else


class OutOfTimeError(Exception):
    """The deadline has come; what is finished is kept."""


@dataclass
class Run:
    """Mutable: one device run, its folder and what has been found so far."""

    folder: Path
    device: str
    budget: int
    experts_budget: int | None
    deadline: float
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until the deadline; OutOfTimeError where there are none."""
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise OutOfTimeError
        return seconds

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of that stage: from an earlier run, or of `work`."""
        if name not in self.found:
            print(f"{name} ... ({self.left:.0f} s left)", flush=True)
            self.found[name] = work()
            (self.folder / "state.json").write_text(json.dumps(self.found))
        return self.found[name]

    def command(self, arguments: Sequence[str]) -> str:
        """What a Python command prints; it is stopped at the deadline."""
        try:
            done = subprocess.run(
                [sys.executable, *arguments],
                capture_output=True,
                text=True,
                cwd=REPOSITORY,
                timeout=self.left,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise OutOfTimeError from None
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(arguments)}: {done.stderr[-3000:]}")
        return done.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is left, print the table; 0 where all stages are done, 3 where time ran out."""
    options = parsed(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    state = options.folder / "state.json"
    found = json.loads(state.read_text()) if state.exists() else {}
    deadline = time.monotonic() + options.seconds
    memory = options.budget, options.experts_budget
    run = Run(options.folder, options.device, *memory, deadline, found)
    late = False
    try:
        for shape in SHAPES[options.shapes]:
            stages(run, shape)
    except OutOfTimeError:
        late = True
    text = table(run.found, SHAPES[options.shapes], where(run.device))
    print(text)
    (options.out or options.folder / "table.md").write_text(text)
    if late:
        print("Time is over: the same command goes on from here.")
    return 3 if late else 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(prog="bench/device.sh", description=__doc__)
    parser.add_argument("folder", type=Path, help="on the disk that is measured; may be new")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="when to stop at the latest")
    parser.add_argument("--shapes", choices=SHAPES, default="published")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=int, default=2 * 1024**3, help="activations, in bytes")
    parser.add_argument("--experts-budget", type=int, help="as that of calibrate, in bytes")
    parser.add_argument("--out", type=Path, help="the table's file  [FOLDER/table.md]")
    return parser.parse_args(arguments)


def stages(run: Run, shape: DeviceShape) -> None:
    """Everything that is done with one shape; its models are removed in the end."""
    home, name = run.folder / shape.name, shape.name
    if f"{name}: done" in run.found:
        return
    depth = run.stage(f"{name}: layers", lambda: {"layers": _fitting(run, shape).layers})
    shape = replace(shape, layers=depth["layers"])
    for role in ROLES:
        run.stage(f"{name}: write {role}", lambda role=role: written(run, shape, home / role, role))
    run.stage(f"{name}: disk", lambda: read_rate(home))
    write_sets(home, shape)
    write_configs(home, home / "c.rain.safetensors")
    for loader in LOADERS:
        run.stage(f"{name}: read {loader}", lambda loader=loader: read(run, shape, home, loader))
    best = max(LOADERS, key=lambda one: per_second(run.found[f"{name}: read {one}"]) or 0.0)
    run.stage(f"{name}: calibrate", lambda: calibrated(run, home, best))
    for method in ("task_arithmetic", "rain") if shape.merges else ():
        run.stage(f"{name}: merge {method}", lambda method=method: merged(run, home, method))
    shutil.rmtree(home)
    run.stage(f"{name}: done", dict)


def _fitting(run: Run, shape: DeviceShape) -> DeviceShape:
    return shape.within(shutil.disk_usage(run.folder).free - _SPARE)


def written(run: Run, shape: DeviceShape, home: Path, role: str) -> dict[str, Any]:
    """A model on the disk."""
    start = time.monotonic()
    count = write_model(home, shape, role, run.device)
    return {"bytes": count, "seconds": time.monotonic() - start, "model_bytes": shape.model_bytes}


def read_rate(home: Path) -> dict[str, Any]:
    """How fast the disk itself gives the weights, in large blocks, one after the other."""
    forget(home)
    buffer, total, start = bytearray(_BLOCK), 0, time.monotonic()
    for path in weights(home):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
        if total > _AT_MOST:
            break
    return {"bytes": total, "seconds": time.monotonic() - start}


def weights(home: Path) -> list[Path]:
    """The weight files of both models."""
    return sorted(path for role in ROLES for path in (home / role).glob("*.safetensors"))


def forget(home: Path) -> None:
    """The system forgets what it has read of the models, so that the disk is read again."""
    for path in weights(home):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(run: Run, shape: DeviceShape, home: Path, loader: str) -> dict[str, Any]:
    """All layers of both models by one loader, with nothing to compute.

    Nothing where it is not installed or fails, or where the models are quantised: then it is not
    used.
    """
    asked = {"what": "read", "loader": loader}
    if loader == MMAP:
        return child(run, home, asked)
    if shape.block is not None:
        return {}
    try:
        require_loader(loader, ahead=True)
        return child(run, home, asked)
    except (RainError, RuntimeError) as error:  # an optional one must not end the run
        print(error)
        return {}


def calibrated(run: Run, home: Path, loader: str) -> dict[str, Any]:
    """One calibration; seconds are those of the run that finished it."""
    trace = str(run.folder / f"{home.name}-trace.json")
    memory = {"budget": run.budget, "experts_budget": run.experts_budget}
    more = {"folder": str(home), "trace": trace, **memory}
    found = child(run, home, {"what": "calibrate", "loader": loader, **more})
    return {**found, "loader": loader}


def child(run: Run, home: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own found, with the weights on the disk alone in the beginning."""
    forget(home)
    asked = {"config": str(home / "rain.yml"), "device": run.device, **options}
    out = run.command(["-m", "benchmarks.device_child", json.dumps(asked)])
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def merged(run: Run, home: Path, method: str) -> dict[str, Any]:
    """One merge by stock mergekit-yaml, imports and all; what it writes is removed."""
    forget(home)
    out = home / "merged"
    shutil.rmtree(out, ignore_errors=True)
    options = [] if run.device == "cpu" else ["--cuda"]
    start = time.monotonic()
    config = str(home / f"{method}.yml")
    run.command(["-m", "mergekit.scripts.run_yaml", config, str(out), *options])
    seconds = time.monotonic() - start
    shutil.rmtree(out)
    return {"seconds": seconds}


def where(device: str) -> str:
    """The machine, in words."""
    card = torch.cuda.get_device_name() if device != "cpu" else "no GPU"
    return f"{card}, {os.cpu_count()} cores, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main())
