"""Check for the report's optional dependency before anything is computed."""

from __future__ import annotations

from importlib import import_module

from rain_mergekit.errors import RainError


def require_matplotlib() -> None:
    """Raise RainError with the command that installs matplotlib if it is missing."""
    try:
        import_module("matplotlib")
    except ImportError:
        raise RainError(
            "the report needs matplotlib, which is not installed: "
            "pip install 'rain-mergekit[report]'"
        ) from None
