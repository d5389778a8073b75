"""RAIN-Merging for mergekit: calibrate with `mergekit-rain`, merge with `mergekit-yaml`.

The names in `__all__` are the public Python API; docs/python.md shows them in use. They are looked
up when they are first used: processes that merely find this package must not pay for torch.
"""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers know the name; importing `typing` costs more than all of this
if TYPE_CHECKING:
    from rain_mergekit.api import (
        CalibrationFile,
        RainError,
        RunOptions,
        calibrate,
        estimate,
        estimate_shape,
        merge,
        project,
        register,
        verify,
    )

__version__ = "0.1.0"
__all__ = [
    "CalibrationFile",
    "RainError",
    "RunOptions",
    "__version__",
    "calibrate",
    "estimate",
    "estimate_shape",
    "merge",
    "project",
    "register",
    "verify",
]


def __getattr__(name: str) -> object:
    """Import the API when one of its names is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rain_mergekit import api  # noqa: PLC0415 - it imports torch and transformers

    return getattr(api, name)
