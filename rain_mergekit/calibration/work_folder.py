"""The folder that lets an interrupted calibration continue where it stopped.

It holds one file a finished layer, from time to time all hidden states after a layer, and what was
found before the first one. It is only used again by a run of the same job: same models, data,
settings, dtype and version.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from rain_mergekit.capture.activation_store import ActivationStore
from rain_mergekit.errors import RainError
from rain_mergekit.system.atomic_file import replacing
from rain_mergekit.system.distributed import World
from rain_mergekit.system.profile import WRITE, phase

LOG = logging.getLogger(__name__)
# Files of a work folder; anything else in it is never deleted.
_OURS = re.compile(
    r"lock|(job|snapshot)\.json|(layer|hidden|process|found)-.*|\..*\.tmp", re.DOTALL
)


class WorkDir:
    """Locked for one process at a time; removed when the calibration file stands.

    After an exception the folder is kept only if a later run can continue from it.
    """

    def __init__(self, path: Path, job: str, world: World, *, every: float) -> None:
        """job: what must be equal to continue; every: seconds from one snapshot to the next."""
        self.path, self._job, self._world, self._every = path, job, world, every
        self._last = 0.0
        self._lock: int | None = None

    @classmethod
    def beside(
        cls, calibration: Path, job: Mapping[str, Any], world: World, *, every: float
    ) -> WorkDir:
        """The folder of the calibration file of that path: its name with `.work`."""
        path = calibration.with_name(calibration.name + ".work")
        return cls(path, json.dumps(job, sort_keys=True), world, every=every)

    def __enter__(self) -> WorkDir:  # noqa: PYI034 - Self needs Python 3.11
        self._last = time.monotonic()
        if self._world.rank == 0:
            self._lock_folder()
            try:
                self._prepare()
            except BaseException:  # also Ctrl-C: __exit__ is only called once this has returned
                self._close(keep=self.finished_layer() is not None)
                raise
        self._world.wait()
        return self

    def _prepare(self) -> None:
        if self._read("job.json") != self._job:
            self._clear()
            with replacing(self.path / "job.json") as out:
                out.write(self._job.encode())

    def _lock_folder(self) -> None:
        self._refuse_foreign()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RainError(
                f"{self.path}: another calibration is writing there; wait for it to end, or give "
                "this one another `parameters.calibration`"
            ) from None
        except OSError as error:
            raise RainError(f"{self.path}: cannot be used as work folder: {error}") from None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._world.wait()
        if self._lock is None:
            return
        self._close(keep=kind is not None and self.finished_layer() is not None)

    def _close(self, *, keep: bool) -> None:
        if not keep:
            self._forget()
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _refuse_foreign(self) -> None:
        """Refuse a folder of this name that holds other files.

        Links are refused too: writing would replace the files that they point to.
        """
        if not self.path.is_dir():
            return
        foreign = [p.name for p in self.path.iterdir() if not _OURS.fullmatch(p.name)]
        foreign += [p.name for p in self.path.rglob("*") if p.is_symlink()]
        if foreign:
            raise RainError(
                f"{self.path}: holds files that are not of a calibration ({min(foreign)}); "
                "move them, or give the calibration another `parameters.calibration`"
            )

    def finished_layer(self) -> int | None:
        """The layer after which hidden states were last saved, or None (also if unreadable)."""
        text = self._read("snapshot.json")
        try:
            return None if text is None else int(json.loads(text)["layer"])
        except (ValueError, KeyError, TypeError):
            return None

    def restore(self, streams: Mapping[str, ActivationStore]) -> int:
        """Load the last saved hidden states; returns the first layer that is still to do."""
        layer = self.finished_layer()
        if self._world.rank == 0:
            self._drop_snapshots(except_for=layer)
        if layer is None:
            return 0
        try:
            for name, store in streams.items():
                store.load(self._snapshot(layer, name))
        except OSError as error:
            raise RainError(
                f"{self.path}: cannot be continued ({error}); remove the folder and run again"
            ) from None
        LOG.info("continuing after layer %d", layer)
        return layer + 1

    def save(
        self,
        layer: int,
        streams: Mapping[str, ActivationStore],
        written: Callable[[], object] = lambda: None,
    ) -> None:
        """Save the hidden states after `layer`, if the last time is long enough ago.

        written: returns once the results of all layers up to this one are there.
        """
        if not self._world.agree(time.monotonic() - self._last >= self._every):
            return
        written()
        with phase(WRITE):
            for name, store in streams.items():
                store.save(self._snapshot(layer, name))
        self._world.wait()
        if self._world.rank == 0:
            with replacing(self.path / "snapshot.json") as out:
                out.write(json.dumps({"layer": layer}).encode())
            self._drop_snapshots(except_for=layer)
        self._last = time.monotonic()

    def _drop_snapshots(self, except_for: int | None) -> None:
        for item in self.path.glob("hidden-*"):
            if except_for is None or not item.name.startswith(f"hidden-{except_for:05d}."):
                item.unlink(missing_ok=True)

    def found(self, name: str, find: Callable[[], Tensor]) -> Tensor:
        """What an earlier run of the job found by that name, else what `find` returns, kept.

        `find` is called by every process or by none, and returns the same to each. A file that
        cannot be read is named in a warning and found anew.
        """
        path = self.path / f"found-{name}.safetensors"
        first = self._world.rank == 0
        known: list[Tensor] = []
        if first and path.exists():
            try:
                known = [load_file(path)[name]]
            except (SafetensorError, KeyError, OSError) as error:
                LOG.warning("%s: cannot be read (%s); it is made again", path, error)
        known = self._world.broadcast(known, 0)
        if known:
            return known[0]
        value = find()
        if first:
            with replacing(path) as out:
                out.write(save({name: value.contiguous()}))
        return value

    def part(self, layer: int) -> Path:
        """The path of one layer's results."""
        return self.path / f"layer-{layer:05d}.safetensors"

    def _snapshot(self, layer: int, name: str) -> Path:
        return self.path / f"hidden-{layer:05d}.{name}.{self._world.rank}"

    def _read(self, name: str) -> str | None:
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            return None

    def _forget(self) -> None:
        """Remove job.json first, so that a half-removed folder is not continued from."""
        with suppress(OSError):
            (self.path / "job.json").unlink()

    def _clear(self) -> None:
        self._forget()
        for item in self.path.iterdir():
            if item.is_dir():
                shutil.rmtree(item, ignore_errors=True)
            elif item.name != "lock":
                item.unlink()
