"""What is wrong with a folder that holds no usable model, said before a loader looks into it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from mergekit.common import ModelReference

from rain_mergekit.errors import RainError
from rain_mergekit.system.untrusted_input import is_lfs_pointer

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_READ = (".json", ".safetensors", ".bin")
# Under these names loaders look for a model's weights.
_WEIGHTS = tuple(
    f"{name}{index}"
    for name in ("model.safetensors", "pytorch_model.bin")
    for index in ("", ".index.json")
)
_NO_GGUF = (
    "take the safetensors files that the model was published with, or let transformers read it "
    "(`from_pretrained(FOLDER, gguf_file=NAME)`) and write it with `save_pretrained`"
)
_SHOWN = 3


def require_model_files(path: str, reference: ModelReference | str) -> None:
    """RainError that names the cause unless the folder holds the files of a model.

    Nothing is opened but small files: opening a named pipe or a device would block.
    """
    require_no_file(path, reference)
    here = list(Path(path).glob("*")) if os.path.isdir(path) else []
    _require_readable(here, reference)
    if any(os.path.exists(Path(path, name)) for name in _WEIGHTS):
        return
    require_no_adapter(path, reference)
    if os.access(path, os.R_OK | os.X_OK):
        found = _instead_of_weights(here)
        raise RainError(f"{reference}: holds no weights that can be read: {found}")


def require_no_file(path: str | os.PathLike[str], reference: ModelReference | str) -> None:
    """RainError if a file is where the folder of a model should be."""
    if not os.path.isfile(path):
        return
    if str(path).endswith(".gguf"):
        raise RainError(f"{reference}: is a GGUF file, which is not read here: {_NO_GGUF}")
    raise RainError(f"{reference}: is a file, expected the folder of a model")


def require_no_adapter(path: str, reference: ModelReference | str) -> None:
    """RainError if the folder, which has no model's weights, holds an adapter."""
    if os.path.exists(Path(path, ADAPTER_CONFIG)):
        raise RainError(
            f"{reference}: is an adapter, not a model: write it after its base model, as "
            f"{_base_of(path)}+{reference}"
        )


def require_adapter_files(path: str, reference: ModelReference | str) -> None:
    """RainError that names the cause unless the folder holds the files of an adapter."""
    if not os.path.isfile(Path(path, ADAPTER_CONFIG)):
        raise RainError(
            f"{reference}: what follows the + is not an adapter: it has no {ADAPTER_CONFIG}"
        )
    _require_readable(Path(path).glob("*"), f"{reference}: the adapter")
    if not any(os.path.exists(Path(path, name)) for name in ADAPTER_WEIGHTS):
        raise RainError(
            f"{reference}: the adapter has no weights: expected {' or '.join(ADAPTER_WEIGHTS)} "
            f"beside {path}/{ADAPTER_CONFIG}"
        )


def _require_readable(paths: Iterable[Path], who: ModelReference | str) -> None:
    """RainError for what only looks like a file of a model."""
    here = list(paths)
    odd = [
        p.name for p in here if p.suffix in _READ and os.path.exists(p) and not os.path.isfile(p)
    ]
    if odd:
        raise RainError(
            f"{who}: cannot read the checkpoint: not a regular file: {', '.join(sorted(odd))}"
        )
    read = (p for p in here if p.suffix in (*_READ, ".model"))
    if pointers := sorted(p.name for p in read if is_lfs_pointer(p)):
        raise RainError(
            f"{who}: {', '.join(pointers)}: a git-lfs pointer, not the file itself: run "
            "`git lfs pull` in that folder, or fetch it with `hf download`"
        )


def _instead_of_weights(here: Iterable[Path]) -> str:
    """What a folder without weights under the usual names holds, and what to do."""
    paths = sorted(here)
    expected = "expected model.safetensors, or its shards and model.safetensors.index.json"
    below = [p.name for p in paths if os.path.isfile(p / "config.json")]
    if below:
        more = ", ..." if len(below) > _SHOWN else ""
        return f"the models are in its folders {', '.join(below[:_SHOWN])}{more}: name one of them"
    if any(p.suffix == ".gguf" for p in paths):
        return f"GGUF files alone; {_NO_GGUF}"
    others = [p.name for p in paths if p.suffix in (".safetensors", ".bin", ".pt", ".pth")]
    return f"{expected}; found {', '.join(others[:_SHOWN]) or 'none'}"


def _base_of(folder: str | Path) -> str:
    """The name of the base model that an adapter records; `BASE` if none."""
    try:
        content = json.loads(Path(folder, ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return str(content.get("base_model_name_or_path") or "BASE")
    except (OSError, ValueError, AttributeError):
        return "BASE"
