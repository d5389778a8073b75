"""Open calibration files and their factors, so that shared ones are read once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Generic, TypeVar

import torch

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.linalg.factors import Factors

V = TypeVar("V")


class Recent(Generic[V]):
    """The most recently used values; a lock ensures that none is computed twice."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of the key, computed if it is missing."""
        with self._lock:
            if key not in self._values:
                self._values[key] = make()
                while len(self._values) > self._capacity:
                    self._values.popitem(last=False)
            self._values.move_to_end(key)
            return self._values[key]


class CalibrationCache:
    """The calibration files opened last, by path and identity; a changed file is opened anew."""

    def __init__(self, capacity: int = 4) -> None:
        self._recent: Recent[CalibrationFile] = Recent(capacity)

    def open(self, path: str) -> CalibrationFile:
        """Return the open file; RainError as `CalibrationFile.open`."""
        try:
            state = Path(path).stat()
        except (OSError, ValueError):
            return CalibrationFile.open(path)  # raises, and says why
        key = (path, str(Path.cwd()), state.st_dev, state.st_ino, state.st_mtime_ns, state.st_size)
        return self._recent.get(key, lambda: CalibrationFile.open(path))


class BasisCache:
    """U and V of the sites used last, on the device that uses them; safe from several threads.

    Eight sites are two layers of a dense decoder: mergekit goes through the tensors by name, so
    those that share a site are near each other.
    """

    def __init__(self, capacity: int = 8) -> None:
        self._recent: Recent[Factors] = Recent(capacity)

    def get(self, calibration: CalibrationFile, site: str, device: torch.device) -> Factors:
        """Return the factors of a site, (d, r) float32 each, on the device."""
        key = (calibration, site, device)
        return self._recent.get(key, lambda: calibration.factors(site).to(device))
