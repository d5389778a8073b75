"""What a calibration file of stream matching changes, multiplied out."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from rain_mergekit.calibration_file.reader import CalibrationFile


def products(path: Path) -> dict[str, Tensor]:
    """A Bᵀ of every weight by its name, float64."""
    file, found = CalibrationFile.open(path), {}
    for name, plan in file.tensors.items():
        factors = file.change(plan)
        assert factors is not None
        found[name] = factors[0].double() @ factors[1].double().mT
    return found
