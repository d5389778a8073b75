"""Where a model's files are: a folder, or the hub's cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from mergekit.common import ModelReference

from rain_mergekit.errors import RainError
from rain_mergekit.models.side_files import HUB_CODE, HUB_PATTERNS
from rain_mergekit.system.untrusted_input import first_line

# The hub client raises its HTTP library's own errors when there is no network; that library
# changes with the version of the client.
HTTP_ERROR: type[BaseException] = HfHubHTTPError.__bases__[0]
_NO_NETWORK = (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError)
# In a folder that stands for a quantised model in a merge: a link to the model's own folder.
PUBLISHED = ".rain-published"
_ADAPTER_PATTERNS = ("adapter_*", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")


def model_folder(reference: ModelReference, cache_dir: str | None, *, trust: bool) -> str:
    """The folder with the model's files; what mergekit does not fetch from the hub is fetched.

    mergekit does not fetch templates, some vocabularies, and (here only with `trust`) the model's
    own code. For a model with an adapter it is the base model's folder. RainError if there is no
    such model.
    """
    model = reference.model
    with named(f"{reference}: model not found", model.path):
        path = str(ModelReference(model=model).local_path(cache_dir=cache_dir))
        if not os.path.exists(model.path):
            snapshot_download(
                model.path,
                revision=model.revision,
                cache_dir=cache_dir,
                allow_patterns=[*HUB_PATTERNS, *(HUB_CODE if trust else ())],
            )
    return path


def published_folder(path: str) -> str:
    """The folder itself, or that of the quantised model for which it stands."""
    link = Path(path, PUBLISHED)
    return str(link.resolve()) if link.is_symlink() else path


def adapter_folder(reference: ModelReference) -> str:
    """The folder with the adapter's files, fetched from the hub if it is named as there."""
    adapter = reference.lora
    if os.path.exists(adapter.path):
        return str(adapter.path)
    with named(f"{reference}: adapter not found", adapter.path):
        found = snapshot_download(
            adapter.path, revision=adapter.revision, allow_patterns=list(_ADAPTER_PATTERNS)
        )
    return str(found)


@contextmanager
def named(headline: str, path: str) -> Iterator[None]:
    """What goes wrong while `path` is looked for becomes one RainError with that headline."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, HTTP_ERROR) as error:
        raise RainError(
            f"{headline}: expected a local folder or a hub name that can be downloaded; "
            f"{_cause(path, error)} ({first_line(error)})"
        ) from None


def _cause(path: str, error: BaseException) -> str:
    """Why nothing was found: wrong name, no network, or the hub's answer."""
    if path.startswith(("/", "./", "../", "~")) or isinstance(error, HFValidationError):
        wrong = "; `~` is not expanded, write the whole path" if path.startswith("~") else ""
        return f"there is no such folder{wrong}"
    if isinstance(error, _NO_NETWORK):
        return "there is no such folder, and the hub cannot be asked: no network, or offline mode"
    if isinstance(error, HfHubHTTPError):
        return "the hub has no such model, or does not show it to you: log in for a gated one"
    if isinstance(error, HTTP_ERROR):
        return "there is no such folder, and the hub cannot be asked: no network, or offline mode"
    return f"there is no such folder ({Path(path).resolve()}), and the hub gives no such model"
