"""What mergekit is given: `register` makes rain and its companions known to it."""

from __future__ import annotations

from rain_mergekit.merge_method import aim, opcm, pcb, rain, regmean, wudi
from rain_mergekit.merge_method.rain import RainMerge

__all__ = ["RainMerge", "register"]

_METHODS = (rain, regmean, aim, opcm, pcb, wudi)


def register() -> None:
    """Make rain and its companions known to mergekit in this process; again is harmless.

    A name that mergekit has already stays mergekit's. While mergekit is being imported this runs
    in the middle of it, so nothing that needs the rest of mergekit may be imported before a merge
    starts.
    """
    from mergekit.merge_methods import registry  # noqa: PLC0415 - the one that is loaded now

    known = {method.spec.name for method in registry.registered_methods()}
    for module in _METHODS:
        if module.METHOD.spec.name not in known:
            registry.register(module.METHOD)
