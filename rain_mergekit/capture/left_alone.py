"""Linear maps that a merge leaves as they are, by their names: routers, gates, linear attention."""

from __future__ import annotations

# The maps from a token's features to experts, and to how much of the shared ones is added.
_ROUTERS = frozenset(("gate", "router", "shared_expert_gate", "wg", "classifier"))
_LINEAR_ATTENTION = "linear_attn"


def routes(name: str, rows: int, width: int) -> bool:
    """Whether the weight (rows, width) is a router, or the gate of shared experts.

    Families call the gate of a feed-forward network `gate` too: it gives as many numbers a token as
    it takes, or more.
    """
    return rows < width and not _ROUTERS.isdisjoint(_modules(name))


def left_alone(name: str, rows: int, width: int) -> bool:
    """Whether the projection leaves the weight alone: routers, their gates, and linear attention.

    How a changed routing or a changed recurrence affects the thinking has not been measured, and
    the models of the paper have neither.
    """
    return _LINEAR_ATTENTION in _modules(name) or routes(name, rows, width)


def nothing(_name: str, _rows: int, _width: int) -> bool:
    """For methods that leave no linear map alone."""
    return False


def _modules(name: str) -> list[str]:
    return name.removesuffix(".weight").split(".")
