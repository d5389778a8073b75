"""Turn a failed sanity check into an error, or into a warning if the user accepted it."""

from __future__ import annotations

from collections.abc import Collection

from rain_mergekit.errors import RainError


def refuse_unless_accepted(check: str, problem: str, accept: Collection[str]) -> str:
    """Return the problem as a warning if `check` is accepted; else raise RainError."""
    if check in accept:
        return f"{problem} (accepted)"
    raise RainError(
        f"{problem}. If this is what you want, add `accept: [{check}]` to the `rain:` section "
        "and calibrate"
    )
