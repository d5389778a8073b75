"""How weights are read ahead of their use, by name; apart, so that `--help` loads no torch."""

from __future__ import annotations

from importlib.util import find_spec

from rain_mergekit.errors import RainError

MMAP, FASTSAFETENSORS = "mmap", "fastsafetensors"
LOADERS = (MMAP, FASTSAFETENSORS)


def require_loader(loader: str, *, ahead: bool) -> None:
    """RainError unless that loader is known, installed and used; ahead: layers are read ahead."""
    if loader not in LOADERS:
        raise RainError(f"loader {loader!r} is not known: choose one of {', '.join(LOADERS)}")
    if loader == MMAP:
        return
    if not ahead:
        raise RainError(
            f"loader {loader} reads layers ahead of their use: leave out --no-read-ahead"
        )
    if find_spec(FASTSAFETENSORS) is None:
        raise RainError(
            f"loader {loader} is not installed: pip install 'rain-mergekit[fast]' (Linux and "
            f"Windows), or choose {MMAP}"
        )
