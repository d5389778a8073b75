"""What the demo writes into a folder, and what it must not touch there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rain_mergekit.errors import RainError
from rain_mergekit.system.shipped_files import TRIO

REPORT = "demo.json"
AUTHOR = "mergekit-rain demo"
# Name of the configuration with which a calibration file is made -> the file.
CALIBRATIONS = {"rain": "trio.rain.safetensors", "projection": "projection.rain.safetensors"}
HELD_OUT = "held-out.jsonl"
ASKED = 120  # held-out prompts with a constraint; half as many without
# Name of the configuration and of the merged model's folder -> how the table calls it.
MERGES = {
    "task-arithmetic": "task_arithmetic 1.0",
    "task-arithmetic-0.7": "task_arithmetic 0.7",
    "task-arithmetic-linear-0.8": "task_arithmetic 0.8, linear",
    "rain": "rain",
    "projection": "rain, projection 1.0",
    "projection-1.2": "rain, projection 1.2",
}


def configurations(folder: Path) -> dict[str, str]:
    """The text of every configuration, by file name; paths are absolute, to work from anywhere."""
    return {f"{name}.yml": configuration(name, folder) for name in MERGES}


def configuration(name: str, folder: Path) -> str:
    """The text of one; its name says the method, and the strength if it is not 1.

    The method is `rain`, `projection` (rain with the paper's fit), `task-arithmetic` or
    `task-arithmetic-linear`.
    """
    if name.startswith("task-arithmetic"):
        return _task_arithmetic(name)
    return _rain(folder) if name == "rain" else _projection(name, folder)


def _strength(name: str) -> str:
    """The number that a name ends in."""
    _, _, last = name.rpartition("-")
    return last if "." in last else "1.0"


def _rain(folder: Path) -> str:
    """With the defaults, which need no pretrained model."""
    return _head("rain", {"instruct": "{role: instruct}"}) + _calibrated("rain", folder)


def _projection(name: str, folder: Path) -> str:
    roles = {role: f"{{role: {role}}}" for role in ("instruct", "pretrained")}
    strength = f"  lambda: {_strength(name)} # may be changed without calibrating again\n"
    return f"{_head('rain', roles)}{_calibrated('projection', folder, strength)}  fit: projection\n"


def _calibrated(made_by: str, folder: Path, strength: str = "") -> str:
    return (
        f"parameters:\n  calibration: {_quoted(folder.resolve() / CALIBRATIONS[made_by])}\n"
        f"{strength}"
        f"dtype: bfloat16\nrain:\n  reasoning_data: {_quoted(TRIO / 'reasoning.jsonl')}\n"
        f"  instruction_data: {_quoted(TRIO / 'instruction.jsonl')}\n"
    )


def _task_arithmetic(name: str) -> str:
    """On all tensors as mergekit does it, or fairer: on those alone that rain changes too."""
    strength = _strength(name)
    weights = {"instruct": strength, "pretrained": f"-{strength}"}
    if "linear" in name:
        linear = "[{{filter: proj.weight, value: {}}}, {{value: 0}}]"
        weights = {role: linear.format(weight) for role, weight in weights.items()}
    parameters = {role: f"{{weight: {weight}}}" for role, weight in weights.items()}
    return _head("task_arithmetic", parameters) + "dtype: bfloat16\n"


def _head(method: str, parameters: Mapping[str, str]) -> str:
    """`parameters`: by role, those of each model besides the reasoning model."""
    models = "".join(
        f"  - model: {_quoted(TRIO / role)}\n    parameters: {text}\n"
        for role, text in parameters.items()
    )
    return (
        f"# Written by `{AUTHOR}`.\n"
        f"merge_method: {method}\n"
        f"base_model: {_quoted(TRIO / 'reasoning')}\n"
        f"models:\n{models}"
    )


def _quoted(path: Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)  # a JSON text is a YAML text


def claim(folder: Path) -> dict[str, str]:
    """Write the report's first line and the configurations; returns their texts by file name.

    Raises RainError if the folder cannot be written, holds files of these names that no demo has
    written, or configurations that were changed since.
    """
    texts = configurations(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if taken := _taken(folder, texts):
            raise RainError(
                f"{folder}: {', '.join(taken)} there would be overwritten; name another folder"
            )
        write_report(folder, {})
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RainError(
            f"{folder}: cannot be written ({error.strerror or error}); name another folder"
        ) from None
    return texts


def _taken(folder: Path, texts: Mapping[str, str]) -> list[str]:
    """Files that belong to the user: every file if no demo wrote here, else the changed ones."""
    if f'"created_by": "{AUTHOR}"' in _read(folder / REPORT):
        return [name for name in texts if _read(folder / name) not in ("", texts[name])]
    ours = (REPORT, *CALIBRATIONS.values(), HELD_OUT, *MERGES, *texts)
    return [name for name in ours if (folder / name).exists()]


def _read(path: Path) -> str:
    """The text of a file; empty if there is none."""
    with suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


def read_report(folder: Path) -> dict[str, Any]:
    """The numbers of demo.json, without who has written them."""
    content: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return {name: value for name, value in content.items() if name != "created_by"}


def write_report(folder: Path, content: Mapping[str, Any]) -> None:
    """Write demo.json: who made the folder, and the numbers once there are some."""
    text = json.dumps({"created_by": AUTHOR, **content}, indent=1)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
