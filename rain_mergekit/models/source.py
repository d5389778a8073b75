"""Where a model's files are: a folder, the hub's cache, or the cache of merged adapters."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from mergekit.common import ModelReference

from rain_mergekit.errors import RainError
from rain_mergekit.models.adapters import merged_adapter
from rain_mergekit.models.side_files import HUB_CODE, HUB_PATTERNS
from rain_mergekit.system.untrusted_input import first_line

# The hub client raises its HTTP library's own errors when there is no network; that library
# changes with the version of the client.
HTTP_ERROR: type[BaseException] = HfHubHTTPError.__bases__[0]


def local_folder(
    reference: ModelReference,
    cache_dir: str | None,
    lora_dir: str | None,
    lora_dtype: str | None,
    *,
    trust: bool,
) -> str:
    """The folder with the model's files; what mergekit does not fetch from the hub is fetched.

    An adapter is merged into the folder `lora_dir` first. RainError if there is no such model.
    """
    if reference.lora is not None and lora_dir is None:
        raise RainError(
            f"{reference}: a model with an adapter is merged into a cache first; "
            "name the folder with --lora-merge-cache"
        )
    with named(reference):
        if reference.lora is not None and lora_dir is not None:
            base = ModelReference(model=reference.model)
            origin = _downloaded(base, cache_dir, trust=trust)
            return merged_adapter(reference, origin, lora_dir, lora_dtype, trust=trust)
        return _downloaded(reference, cache_dir, trust=trust)


@contextmanager
def named(reference: ModelReference) -> Iterator[None]:
    """What goes wrong while a model is looked for becomes one RainError that names it."""
    try:
        yield
    except pickle.UnpicklingError:  # peft and transformers load weights alone
        raise RainError(
            f"{reference}: a pickle file there holds more than weights, and could run code; take "
            "safetensors files from where you trust them"
        ) from None
    except (OSError, ValueError, RuntimeError, HTTP_ERROR) as error:
        raise RainError(
            f"{reference}: model not found: expected a local folder or a hub name that can be "
            f"downloaded; {_cause(reference.model.path, error)} ({first_line(error)})"
        ) from None


def _downloaded(reference: ModelReference, cache_dir: str | None, *, trust: bool) -> str:
    """The folder that mergekit finds, with templates, vocabularies and trusted code."""
    path = str(reference.local_path(cache_dir=cache_dir))
    if not os.path.exists(reference.model.path):
        snapshot_download(
            reference.model.path,
            revision=reference.model.revision,
            cache_dir=cache_dir,
            allow_patterns=[*HUB_PATTERNS, *(HUB_CODE if trust else ())],
        )
    return path


def _cause(path: str, error: BaseException) -> str:
    """Why the model was not found: wrong name, no network, or the hub's answer."""
    if path.startswith(("/", "./", "../", "~")) or isinstance(error, HFValidationError):
        wrong = "; `~` is not expanded, write the whole path" if path.startswith("~") else ""
        return f"there is no such folder{wrong}"
    if isinstance(error, HfHubHTTPError):
        return "the hub has no such model, or does not show it to you: log in for a gated one"
    if isinstance(error, (OfflineModeIsEnabled, ConnectionError, HTTP_ERROR)):
        return "there is no such folder, and the hub cannot be asked: no network, or offline mode"
    where = Path(path).resolve()
    return f"there is no such folder ({where}), and the hub gives no such model"
