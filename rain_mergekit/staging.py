"""A folder of results that appears as a whole or not at all."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rain_mergekit.errors import RainError

_SHARD = re.compile(r"(model-\d{5}-of-\d{5}\.(safetensors|bin)|model\.safetensors(\.index\.json)?)")
_LAST = "config.json"  # without it a folder is no model yet


@contextmanager
def staged_folder(path: str | Path) -> Iterator[Path]:
    """Give an empty folder of the same name; its content moves to `path` when the block succeeds.

    It lies inside `path`, so that both are one file system. Other files there stay, but weights of
    an earlier merge that the new one does not replace go: mixed shards would be read as one model.
    After a failure nothing is left, not even `path` if it was not there.

    Raises:
        RainError: `path` cannot be written, found out before the block begins.
    """
    target = Path(path).expanduser().resolve()
    created = [p for p in (target, *target.parents) if not p.exists()]
    try:
        target.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".rain-", dir=target))
    except OSError as error:
        _remove_empty(created)
        raise RainError(
            f"{path}: cannot be written ({error.strerror or error}); name another output folder"
        ) from None
    try:
        stage = work / (target.name or "merged")
        stage.mkdir()
        yield stage
        _move(stage, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _remove_empty(created)


def _move(stage: Path, target: Path) -> None:
    new = {item.name for item in stage.iterdir()}
    if any(_SHARD.fullmatch(name) for name in new):
        for item in target.iterdir():
            if _SHARD.fullmatch(item.name) and item.name not in new:
                item.unlink()
    for name in sorted(new, key=lambda name: (name == _LAST, name)):
        goal = target / name
        if goal.is_dir() and not goal.is_symlink():
            shutil.rmtree(goal)
        (stage / name).replace(goal)


def _remove_empty(folders: list[Path]) -> None:
    """Remove those that are still empty, the innermost first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
