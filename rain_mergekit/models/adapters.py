"""Models given as base and adapter: keep mergekit's cache of merged adapters up to date.

mergekit never renews a folder of that cache, even if the adapter has changed, and writes nothing
but weights and a config into it.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from mergekit.common import ModelReference
from safetensors import SafetensorError
from transformers import AutoConfig

from rain_mergekit.errors import RainError
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.config_file import (
    published_config,
    read_config_file,
    write_config_file,
)
from rain_mergekit.models.empty_model import empty_model
from rain_mergekit.models.folder_check import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    require_adapter_files,
    require_model_files,
)
from rain_mergekit.models.model_tensors import ModelTensors
from rain_mergekit.models.side_files import copy_files, is_of_tokenizer, side_files
from rain_mergekit.models.source import adapter_folder
from rain_mergekit.models.weight_files import add_tensors
from rain_mergekit.system.memory import out_of_memory
from rain_mergekit.system.untrusted_input import first_line

RECORD = "rain_source.json"
_LAYOUT = 2  # version of the folder: from 2 on it holds tensors that no class knows, too


def merged_adapter(
    reference: ModelReference, base: str, cache: str, dtype: str | None, *, trust: bool
) -> str:
    """The folder with the merged model; made anew where the adapter or the base has changed.

    base: the base model's folder. Files beside the weights are the base model's; the tokenizer's
    are the adapter's, where it has some. RainError if one of them, or the cache, cannot be used.
    """
    adapter = adapter_folder(reference)
    require_model_files(base, reference)
    require_adapter_files(adapter, reference)
    made_from = {
        "layout": _LAYOUT,
        "base": _base_digest(base),
        "adapter": _adapter_digest(adapter),
        "dtype": dtype,
    }
    parts = reference.model, reference.lora  # the name is mergekit's, which must find it too
    folder = Path(cache, "_".join(part._unique_id() for part in parts))  # noqa: SLF001
    if folder.is_dir():
        if _record(folder) == made_from:
            return str(folder)
        shutil.rmtree(folder)
    with _named(reference, folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        reference.merged(cache_dir=cache, trust_remote_code=trust, lora_merge_dtype=dtype)
        _complete(folder, base, adapter)
        _add_unknown(folder, base, trust=trust)
        (folder / RECORD).write_text(json.dumps(made_from, indent=2) + "\n", encoding="utf-8")
    return str(folder)


@contextmanager
def _named(reference: ModelReference, folder: Path) -> Iterator[None]:
    """What goes wrong while `folder` is made becomes one RainError; no part of it stays.

    Else it would be taken for the merged model.
    """
    try:
        yield
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, RainError) or out_of_memory(error):
            raise
        line = first_line(error)
        if isinstance(error, pickle.UnpicklingError):  # peft and transformers load weights alone
            raise RainError(
                f"{reference}: a pickle file there holds more than weights, and could run code; "
                "take safetensors files from where you trust them"
            ) from None
        if isinstance(error, SafetensorError):
            raise RainError(
                f"{reference}: cannot read the adapter or its base model: {line}; fetch both again"
            ) from None
        if isinstance(error, OSError):
            raise RainError(
                f"{reference}: the adapter cannot be merged into {folder}: {line}"
            ) from None
        if isinstance(error, (RuntimeError, ValueError, LookupError, TypeError, AttributeError)):
            raise RainError(
                f"{reference}: the adapter does not fit its base model: {line}; it was made for "
                "another model, or for one whose vocabulary was resized"
            ) from None
        raise


def adapter_digest(folder: str | Path) -> str | None:
    """Which adapter a merged model of the cache was made with; None for any other model."""
    found = _record(Path(folder))
    digest = found.get("adapter") if isinstance(found, dict) else None
    return digest if isinstance(digest, str) else None


def _complete(folder: Path, base: str, adapter: str) -> None:
    """Add what the merged model needs besides its weights."""
    written = read_config_file(folder)
    size = published_config(read_config_file(base), dtype=_type_of(written), vocabulary=None)
    write_config_file(folder, size)
    own = side_files(adapter)
    names = side_files(base)
    if any(is_of_tokenizer(name) for name in own):
        names = [name for name in names if not is_of_tokenizer(name)]
        copy_files(adapter, folder, [name for name in own if is_of_tokenizer(name)])
    copy_files(base, folder, names)


def _add_unknown(folder: Path, base: str, *, trust: bool) -> None:
    """Add the tensors of the base model that no class of transformers knows, as they are there.

    transformers, which merges the adapter, reads and writes none of them.
    """
    checkpoint = Checkpoint.open(_reference(base), base, trust_remote_code=trust)
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust)
    model = empty_model(config, torch.float32, trust_remote_code=trust)
    unknown = ModelTensors.of(checkpoint, model).unknown
    if unknown:
        add_tensors(folder, {name: checkpoint.get(name) for name in unknown})
    checkpoint.release()


def _reference(folder: str) -> ModelReference:
    return ModelReference.model_validate({"model": {"path": folder}})


def _type_of(config: dict[str, object]) -> str | None:
    found = config.get("dtype", config.get("torch_dtype"))
    return found if isinstance(found, str) else None


def _record(folder: Path) -> object:
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _base_digest(folder: str) -> str:
    """Identifies the base by names, sizes and times of its files: weights are too large to hash."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and path.suffix in (".safetensors", ".bin", ".json"):
            state = path.stat()
            digest.update(f"{path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _adapter_digest(folder: str) -> str:
    """Digest of the adapter's weights, its config, and the tokenizer files taken from it."""
    digest = hashlib.sha256()
    for name in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS, *side_files(folder)):
        path = Path(folder, name)
        if path.is_file():
            state = path.stat()
            content = _content(str(path), state.st_size, state.st_mtime_ns)
            digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=64)
def _content(path: str, _size: int, _changed: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
