"""`reproduce.json`: what a merge was made from, with what and how, and digests of all its tensors.

Names of models are those that others find; no folder of this machine is in it.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

from rain_mergekit import __version__
from rain_mergekit.calibration_file.container import raw_bytes
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.config.merge_config import RainConfig
from rain_mergekit.errors import RainError
from rain_mergekit.models.weight_files import open_weights, weight_files
from rain_mergekit.publish.layout import RECORD
from rain_mergekit.report.public_names import PublicName, public_name, without_local_paths
from rain_mergekit.system.atomic_file import replacing
from rain_mergekit.system.json_samples import file_digest
from rain_mergekit.system.untrusted_input import first_line, read_regular, within

FORMAT = "rain-mergekit reproduce 1"
Tick: TypeAlias = "Callable[[int], object]"
_LIBRARIES = ("mergekit", "torch", "transformers", "safetensors", "huggingface_hub", "numpy")


@dataclass(frozen=True)
class MergeRecord:
    """What reproduce.json holds.

    versions: of libraries and the machine. models: reference, commit and fingerprint by role.
    calibration, tensors: SHA-256 of the file, and of each merged tensor's bytes by name. data: what
    the calibration records of its sets. config: the YAML. run: how it was computed, seeds included.
    commands: what was typed.
    """

    versions: Mapping[str, str]
    models: Mapping[str, Any]
    calibration: str
    data: Mapping[str, Any]
    config: str
    run: Mapping[str, Any]
    commands: tuple[str, ...]
    tensors: Mapping[str, str]


def make_record(
    config: RainConfig,
    run: Mapping[str, Any],
    commands: tuple[str, ...],
    tensors: Mapping[str, str],
) -> MergeRecord:
    """Of the merge that `config` describes. tensors: of `tensor_digests`.

    RainError if weights or calibration cannot be read.
    """
    file = CalibrationFile.open(config.calibration)
    try:
        header = public_header(file.header)
    finally:
        file.close()
    return MergeRecord(
        versions=versions(),
        models=header["models"],
        calibration=file_digest(config.calibration) or "",
        data={k: v for k, v in (header.get("data") or {}).items() if isinstance(v, dict)},
        config=without_local_paths(config.text, config),
        run={**(header.get("run") or {}), **run},
        commands=tuple(without_local_paths(line, config) for line in commands),
        tensors=tensors,
    )


def public_header(header: Mapping[str, Any]) -> dict[str, Any]:
    """A calibration's header with public names in place of this machine's folders."""
    models = {
        role: {**one, "reference": _reference(public_name(str(one.get("reference", ""))))}
        for role, one in header["models"].items()
    }
    data = {
        name: {**one, "path": Path(str(one["path"])).name}
        if isinstance(one, dict) and "path" in one
        else one
        for name, one in (header.get("data") or {}).items()
    }
    settings = dict(header.get("settings") or {})
    for key in ("reasoning_data", "instruction_data"):
        if isinstance(settings.get(key), str):
            settings[key] = Path(settings[key]).name
    return {**header, "models": models, "data": data, "settings": settings}


def _reference(name: PublicName) -> str:
    """A public name as mergekit writes references."""
    return f"{name.hub}@{name.revision}" if name.hub and name.revision else str(name.text)


def versions() -> dict[str, str]:
    """Versions of everything on which the bits of a merge may depend."""
    found = {"rain_mergekit": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return {**found, "system": platform.system(), "machine": platform.machine()}


def tensor_digests(folder: Path, tick: Tick = lambda _bytes: None) -> dict[str, str]:
    """SHA-256 of type, shape and bytes of every tensor in the folder's weight files, by name.

    `tick` is told how many bytes were read. RainError if there are no weights.
    """
    found: dict[str, str] = {}
    for path in weight_files(folder):
        with open_weights(path) as weights:
            for name in weights.names:
                tensor = weights.get(name)
                digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(raw_bytes(tensor))
                found[name] = digest.hexdigest()
                tick(tensor.numel() * tensor.element_size())
    if not found:
        raise RainError(f"{folder}: holds no weights; merge into it first")
    return found


def write_record(folder: Path, record: MergeRecord) -> None:
    """Write it into the folder of the merged model; RainError if it cannot be written."""
    content = {"format": FORMAT, **{f.name: getattr(record, f.name) for f in fields(record)}}
    path = within(folder, RECORD)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as out:
        out.write(json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


def read_record(folder: Path) -> MergeRecord:
    """RainError if the folder has none, or one that cannot be understood."""
    path = folder / RECORD
    try:
        return _record(json.loads(read_regular(path)))
    except FileNotFoundError:
        raise RainError(
            f"{path}: is not there: nothing says how this model was made (`mergekit-rain auto` and "
            "`mergekit-rain push` write it)"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RainError(f"{path}: cannot be read: {first_line(error)}") from None


def _record(content: Any) -> MergeRecord:
    """From what the file says; ValueError, KeyError or TypeError where it is no record."""
    if content["format"] != FORMAT:
        raise ValueError(f"its format is {str(content['format'])[:40]!r}, expected {FORMAT!r}")
    found = {f.name: content[f.name] for f in fields(MergeRecord)}
    maps = ("versions", "models", "data", "run", "tensors")
    if not all(isinstance(found[name], dict) for name in maps):
        raise ValueError("one of its parts is no JSON object")
    if not all(isinstance(found[name], str) for name in ("config", "calibration")):
        raise ValueError("one of its parts is no text")
    return MergeRecord(**{**found, "commands": tuple(map(str, found["commands"]))})
