"""The folder beside the calibration file that lets an interrupted run go on where it was.

It holds one file a finished layer and, from time to time, all hidden states after a layer. It is
only used again by a run of the same job: same models, data, settings, dtype and version.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rain_mergekit.atomic import replacing
from rain_mergekit.errors import RainError
from rain_mergekit.store import ActivationStore

LOG = logging.getLogger(__name__)


class WorkDir:
    """Locked for one process at a time; removed when the calibration file stands.

    Leaving the context by an exception keeps the folder only if there is something to go on from.
    """

    def __init__(self, calibration: Path, job: Mapping[str, Any], *, every: float) -> None:
        self.path = calibration.with_name(calibration.name + ".work")
        self._job = json.dumps(job, sort_keys=True)
        self._every, self._last = every, time.monotonic()
        self._lock: int | None = None

    def __enter__(self) -> WorkDir:  # noqa: PYI034 - Self needs Python 3.11
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
        if self._read("job.json") != self._job:
            self._clear()
            with replacing(self.path / "job.json") as out:
                out.write(self._job.encode())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        resumable = kind is not None and self.finished_layer() is not None
        if not resumable:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)

    def finished_layer(self) -> int | None:
        """The layer after which hidden states were last saved, or None."""
        text = self._read("snapshot.json")
        return None if text is None else int(json.loads(text)["layer"])

    def restore(self, streams: Mapping[str, ActivationStore]) -> int:
        """Load the last saved hidden states; returns the first layer that is still to do."""
        layer = self.finished_layer()
        if layer is None:
            return 0
        for name, store in streams.items():
            store.load(self._snapshot(layer, name))
        LOG.info("continuing after layer %d", layer)
        return layer + 1

    def save(self, layer: int, streams: Mapping[str, ActivationStore]) -> None:
        """Save the hidden states after `layer`, if the last time is long enough ago."""
        if time.monotonic() - self._last < self._every:
            return
        previous = self.finished_layer()
        for name, store in streams.items():
            store.save(self._snapshot(layer, name))
        with replacing(self.path / "snapshot.json") as out:
            out.write(json.dumps({"layer": layer}).encode())
        if previous is not None:
            for name in streams:
                self._snapshot(previous, name).unlink(missing_ok=True)
        self._last = time.monotonic()

    def part(self, layer: int) -> Path:
        """Where the results of one layer lie."""
        return self.path / f"layer-{layer:05d}.safetensors"

    def _snapshot(self, layer: int, name: str) -> Path:
        return self.path / f"hidden-{layer:05d}.{name}"

    def _read(self, name: str) -> str | None:
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            return None

    def _clear(self) -> None:
        for item in self.path.iterdir():
            if item.name != "lock":
                item.unlink()
