"""Make `merge_method: rain` known to mergekit in every process that imports mergekit.

mergekit has no plugin mechanism, but it imports torch, and torch calls every entry point of the
group `torch.backends` at the end of `import torch`. Ours, `install`, puts one finder on
`sys.meta_path` that waits for `mergekit.merge_methods.registry`; when that module has been
executed, the finder goes away and `rain_mergekit.merge_method.method.register()` runs. Nothing of
mergekit or of the rest of this package is imported before that.

Switches: `RAIN_MERGEKIT_AUTOLOAD=0` turns this off, and so does torch's own
`TORCH_DEVICE_BACKEND_AUTOLOAD=0`, which turns off the `torch.backends` entry points of all
packages. With either, call `rain_mergekit.merge_method.method.register()` or use
`mergekit-rain merge`.

No failure in here may break `import torch` or a merge by another method: it ends as a log record.
Standard library only.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

SWITCH = "RAIN_MERGEKIT_AUTOLOAD"
REGISTRY = "mergekit.merge_methods.registry"
METHOD = "rain_mergekit.merge_method.method"

LOG = logging.getLogger(__name__)


def install() -> None:
    """Register the method as soon as mergekit's registry is there; the entry point's function.

    Calling it again changes nothing, except after mergekit's registry was reloaded or imported
    afresh: that empties it, and a call fills it again. Never raises.
    """
    try:
        if os.environ.get(SWITCH, "1").strip().lower() in {"0", "false", "no", "off"}:
            return
        if _ready(REGISTRY):
            _register()
        elif not any(_is_ours(finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Watcher())
    except Exception as error:  # noqa: BLE001 - `import torch` must survive whatever this is
        _report(error)


def _register() -> None:
    """Import the method and register it; a failure is logged and goes no further."""
    try:
        importlib.import_module(METHOD).register()
    except Exception as error:  # noqa: BLE001 - merges by other methods must go on
        _report(error)


def _ready(name: str) -> bool:
    """Whether the module is imported and has been executed to its end."""
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    return module is not None and not getattr(spec, "_initializing", False)


def _report(error: Exception) -> None:
    LOG.warning(
        "merge_method: rain is not available in this process: %s: %s (%s=0 stops the attempt)",
        type(error).__name__,
        error,
        SWITCH,
    )
    LOG.debug("where it failed", exc_info=error)


def _is_ours(finder: object) -> bool:
    """Whether it is the watcher; by name, so that one from before a reload counts too."""
    return type(finder).__module__ == __name__


class _Watcher:
    """A finder that finds nothing itself: it lets the others find the registry, and wraps it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the registry's spec with a loader that registers after it; None for the rest."""
        if name != REGISTRY:
            return None
        spec = self._find(name, path, target)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec

    def _find(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        """Ask the finders behind this one; those before it had their turn."""
        finders = list(sys.meta_path)
        start = finders.index(self) + 1 if self in finders else 0
        finds = (getattr(f, "find_spec", None) for f in finders[start:] if not _is_ours(f))
        specs = (find(name, path, target) for find in finds if find)
        return next((spec for spec in specs if spec is not None), None)


class _Loader:
    """The registry's own loader; after it has executed the module, the method is registered."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        # Source, resources, is_package...: whatever others ask a loader, the real one answers.
        if name.startswith("__"):  # copying and pickling ask before _loader is there
            raise AttributeError(name)
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the registry, leave no trace of the wrapping, then register the method."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        # A new list: another thread may be walking through the old one in an import of its own.
        sys.meta_path = [finder for finder in sys.meta_path if not _is_ours(finder)]
        _register()
