"""The table of a device run: a column for each shape, a row for each thing that was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.device_shapes import DeviceShape
from rain_mergekit.system.loader_choice import LOADERS

Found = Mapping[str, Mapping[str, Any]]
_GIB, _GIGA = 1024**3, 1e9
NOT_YET = "not yet"


def table(found: Found, shapes: Sequence[DeviceShape], where: str) -> str:
    """Markdown; `not yet` where a stage has not been reached."""
    columns = [dict(_rows(found, shape)) for shape in shapes]
    head = f"`bench/device.sh` on {where}\n\n| | {' | '.join(s.name for s in shapes)} |\n|---|"
    lines = [head + "---:|" * len(shapes)]
    lines += [f"| {row} | {' | '.join(c[row] for c in columns)} |" for row in columns[0]]
    return "\n".join(lines) + "\n"


def _rows(found: Found, shape: DeviceShape) -> Iterator[tuple[str, str]]:
    def of(stage: str) -> Mapping[str, Any] | None:
        return found.get(f"{shape.name}: {stage}")

    def cell(stage: str, *keys: str) -> Any:
        record: Any = of(stage)
        for key in keys:
            record = None if record is None else record.get(key)
        return record

    layers, disk = cell("layers", "layers"), of("disk")
    yield "layers, of the published", _text(layers, f"{layers} of {shape.published_layers}")
    yield "a model, GiB", _number(cell("write reasoning", "model_bytes"), _GIB)
    yield "written, GB/s", _rate(of("write instruct"))
    own = per_second(disk)
    yield "disk's own rate, GB/s", _number(own, _GIGA)
    for loader in LOADERS:
        unused = of(f"read {loader}") == {}  # not installed, failed, or the models are quantised
        yield f"{loader} alone, GB/s", "not used" if unused else _rate(of(f"read {loader}"))
    loader = cell("calibrate", "loader")
    yield "calibrated with", _text(loader, str(loader))
    seconds = cell("calibrate", "seconds")
    yield "calibrate, s", _number(seconds)
    yield "planned by this machine's rates, s", _number(cell("calibrate", "planned_seconds"))
    peak = cell("calibrate", "gpu_peak")
    yield "peak GPU memory, GiB", "no GPU" if seconds and not peak else _number(peak, _GIB)
    yield "peak memory of the process, GiB", _number(cell("calibrate", "host_peak"), _GIB)
    yield "planned above the imports, GiB", _number(cell("calibrate", "planned_peak"), _GIB)
    read = cell("calibrate", "read_bytes"), cell("calibrate", "read_seconds")
    loading = read[0] / read[1] if read[0] and read[1] else None
    yield "loading, GB/s", _number(loading, _GIGA)
    share = loading / own if loading and own else None
    yield "loading, of the disk's own rate", _share(share)
    for phase in ("forward", "solve", "load", "states", "write"):
        spent = cell("calibrate", "phases", phase) or (0.0 if seconds else None)
        yield f"time in {phase}", _share(spent / seconds if seconds else None)
    yield "calibration file, GiB", _number(cell("calibrate", "file_bytes"), _GIB)
    for method in ("task_arithmetic", "rain"):
        merged = _number(cell(f"merge {method}", "seconds")) if shape.merges else "not merged"
        yield f"{method} merge, s", merged


def per_second(record: Mapping[str, Any] | None) -> float | None:
    """Bytes a second; None where nothing was read."""
    return record["bytes"] / max(record["seconds"], 1e-9) if record else None


def _rate(record: Mapping[str, Any] | None) -> str:
    return _number(per_second(record), _GIGA)


def _text(value: Any, text: str) -> str:
    return NOT_YET if value is None else text


def _number(value: float | None, unit: float = 1.0) -> str:
    return NOT_YET if value is None else f"{value / unit:.3g}"


def _share(value: float | None) -> str:
    return NOT_YET if value is None else f"{value:.1%}"
