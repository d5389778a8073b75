"""Models given as base and adapter: keep mergekit's cache of merged adapters up to date.

mergekit never renews a folder of that cache, even if the adapter has changed, and writes nothing
but weights and a config into it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from functools import lru_cache
from pathlib import Path

from huggingface_hub import snapshot_download
from mergekit.common import ModelReference

from rain_mergekit.errors import RainError
from rain_mergekit.models.config_file import (
    published_config,
    read_config_file,
    write_config_file,
)
from rain_mergekit.models.side_files import copy_files, is_of_tokenizer, side_files
from rain_mergekit.system.memory import out_of_memory
from rain_mergekit.system.untrusted_input import first_line

RECORD = "rain_source.json"
CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_HUB_PATTERNS = ("adapter_*", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")


def merged_adapter(
    reference: ModelReference, base: str, cache: str, dtype: str | None, *, trust: bool
) -> str:
    """The folder with the merged model; made anew where the adapter or the base has changed.

    base: the base model's folder. Files beside the weights are the base model's; the tokenizer's
    are the adapter's, where it has some.
    """
    adapter = _adapter_folder(reference)
    if not Path(adapter, CONFIG).is_file():
        raise RainError(f"{reference}: what follows the + is not an adapter: it has no {CONFIG}")
    made_from = {"base": _base_digest(base), "adapter": _adapter_digest(adapter), "dtype": dtype}
    parts = reference.model, reference.lora  # the name is mergekit's, which must find it too
    folder = Path(cache, "_".join(part._unique_id() for part in parts))  # noqa: SLF001
    if folder.is_dir():
        if _record(folder) == made_from:
            return str(folder)
        shutil.rmtree(folder)
    try:
        reference.merged(cache_dir=cache, trust_remote_code=trust, lora_merge_dtype=dtype)
        _complete(folder, base, adapter)
        (folder / RECORD).write_text(json.dumps(made_from, indent=2) + "\n", encoding="utf-8")
    except (RuntimeError, ValueError) as error:
        shutil.rmtree(folder, ignore_errors=True)  # else it would be taken for the merged model
        if isinstance(error, RainError) or out_of_memory(error):
            raise
        raise RainError(
            f"{reference}: the adapter does not fit its base model: {first_line(error)}; it was "
            "made for another model, or for one whose vocabulary was resized"
        ) from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return str(folder)


def adapter_digest(folder: str | Path) -> str | None:
    """Which adapter a merged model of the cache was made with; None for any other model."""
    found = _record(Path(folder))
    digest = found.get("adapter") if isinstance(found, dict) else None
    return digest if isinstance(digest, str) else None


def is_adapter(folder: str | Path) -> bool:
    """Whether the folder holds an adapter and no model."""
    # False where permission is missing; opening the file reports that
    return os.path.isfile(Path(folder, CONFIG)) and not os.path.exists(Path(folder, "config.json"))


def base_of(folder: str | Path) -> str:
    """The name of the base model that an adapter records; `BASE` if none."""
    try:
        content = json.loads(Path(folder, CONFIG).read_text(encoding="utf-8"))
        return str(content.get("base_model_name_or_path") or "BASE")
    except (OSError, ValueError, AttributeError):
        return "BASE"


def _adapter_folder(reference: ModelReference) -> str:
    path = str(reference.lora.path)
    if os.path.exists(path):
        return path
    revision = reference.lora.revision
    return str(snapshot_download(path, revision=revision, allow_patterns=list(_HUB_PATTERNS)))


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
    for name in (CONFIG, *_WEIGHTS, *side_files(folder)):
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
