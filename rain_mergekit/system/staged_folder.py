"""A folder of results that appears as a whole or not at all."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rain_mergekit.errors import RainError

# Weights under every name by which a loader looks for them; loaders prefer one format to the other.
_SHARD = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
_LAST = "config.json"  # without it a folder is no model yet
_PREFIX = ".rain-"


@contextmanager
def staged_folder(path: str | Path) -> Iterator[Path]:
    """Create an empty folder whose content moves to `path` when the block succeeds.

    The new folder lies inside `path`, on the same file system. Other files in `path` stay, but
    weights of an earlier merge that the new one does not replace are removed: mixed shards would be
    read as one model. After a failure nothing is left, not even `path` if it did not exist; what a
    killed process left in `path` is removed by the next one. A process that is killed while files
    move leaves a folder without config.json, which no program takes for a model.

    Raises:
        RainError: `path` cannot be written, found out before the block begins.
    """
    target = output_folder(path)
    with _stage(path, target, target) as stage:
        yield stage
        _move(stage, target)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Create an empty folder that is moved to `path`, where nothing may be yet, on success.

    It lies beside `path`, on the same file system. After a failure nothing is left; what a killed
    process left there is removed by the next one.

    Raises:
        RainError: `path` exists or cannot be written, found out before the block begins; or
            writing fails in the block.
    """
    target = output_folder(path)
    if target.exists():
        raise RainError(f"{path}: exists, and is not overwritten; name another output folder")
    with _stage(path, target, target.parent) as stage:
        try:
            yield stage
            stage.rename(target)
        except OSError as error:
            raise _unwritable(path, error) from None


@contextmanager
def _stage(path: str | Path, target: Path, place: Path) -> Iterator[Path]:
    """An empty folder with the target's name in a locked one inside `place`, which is removed."""
    created = [p for p in (place, *place.parents) if not p.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
        _remove_left_over(place)
        work, lock = _workspace(place)
    except OSError as error:
        _remove_empty(created)
        raise _unwritable(path, error) from None
    try:
        stage = work / (target.name or "merged")
        stage.mkdir()
        yield stage
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)
        _remove_empty(created)


def _unwritable(path: str | Path, error: OSError) -> RainError:
    return RainError(
        f"{path}: cannot be written ({error.strerror or error}); name another output folder"
    )


def output_folder(path: str | Path) -> Path:
    """The path with links resolved; RainError if no folder can have it."""
    try:
        found = Path(path).expanduser().resolve()
        found.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, by Python's version
        reason = getattr(error, "strerror", None) or str(error)
        raise RainError(
            f"{path}: cannot be written ({reason}); name another output folder"
        ) from None
    return found


def _workspace(target: Path) -> tuple[Path, int]:
    """A new folder and its lock; tried again if another merge removed it as left over."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=target))
        with suppress(BlockingIOError, FileNotFoundError):
            lock = _lock(work)
            if work.exists():
                return work, lock
            os.close(lock)


def _lock(folder: Path) -> int:
    """Hold the folder for as long as this process lives; BlockingIOError if another one does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _remove_left_over(target: Path) -> None:
    for folder in target.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # BlockingIOError: another merge into this folder is alive
            lock = _lock(folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _move(stage: Path, target: Path) -> None:
    new = {item.name for item in stage.iterdir()}
    if _LAST in new:
        (target / _LAST).unlink(missing_ok=True)
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
