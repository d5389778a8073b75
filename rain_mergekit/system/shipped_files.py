"""Where the files lie that come with the package beside its modules."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
TRIO = _PACKAGE / "trio"  # three small models with their own sets
_IN_THE_WHEEL = _PACKAGE / "examples"


def shipped(name: str) -> Path:
    """The folder of that name, `configs` or `calibration`: in the wheel, else in the clone."""
    return (_IN_THE_WHEEL if _IN_THE_WHEEL.is_dir() else _PACKAGE.parent) / name
