"""Parameters of the merge methods: the check of each value and its message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

from mergekit.merge_methods.base import ParameterScope, ParameterSpec

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.errors import RainError
from rain_mergekit.merge_method.cache import CalibrationCache
from rain_mergekit.merge_method.merge_errors import RainMergeError, reported
from rain_mergekit.system.untrusted_input import finite_number, shown


@dataclass(frozen=True)
class _Checked(ParameterSpec):  # type: ignore[misc] # mergekit publishes no types
    """Optional for mergekit, whose own message for a missing parameter is a traceback."""

    check: Callable[[Any], Any] = str

    def validate(self, value: Any) -> Any:
        return self.check(value)


def checked_parameter(
    name: str, kind: type, scope: ParameterScope, default: object, check: Callable[[Any], Any]
) -> ParameterSpec:
    """A parameter with a check of its own, which gives the value to use."""
    return _Checked(name, kind, scope, default=default, check=check)


def shared(
    name: str, default: object, check: Callable[[Any], Any], kind: type = float
) -> ParameterSpec:
    """A parameter that all models share; it may be a list over the layers, or filters."""
    return checked_parameter(name, kind, ParameterScope.SHARED, default, check)


def number(
    name: str, low: float = -float("inf"), high: float = float("inf"), *, above: bool = False
) -> Callable[[Any], float]:
    """A check for a finite number from `low` to `high`; above: `low` itself is excluded."""

    def check(value: object) -> float:
        found = finite_number(value)
        if found is None or not low <= found <= high or (above and found == low):
            limits = _limits(low, high, above=above)
            raise RainMergeError(f"{name} must be a finite number{limits}, found {shown(value)}")
        return found

    return check


def _limits(low: float, high: float, *, above: bool) -> str:
    if high < float("inf"):
        return f" {'above' if above else 'from'} {low:g} to {high:g}"
    if low > -float("inf"):
        return f" of at least {low:g}"
    return ""


def one_of(name: str, *choices: str) -> Callable[[Any], str]:
    """A check for one of a few words."""

    def check(value: object) -> str:
        if value not in choices:
            wanted = " or ".join(choices)
            raise RainMergeError(f"{name} must be {wanted}, found {shown(value)}")
        return str(value)

    return check


def role(*choices: str) -> Callable[[Any], str | None]:
    """A check for a model's role: one of these, or None."""
    named = one_of("role", *choices)
    return lambda value: None if value is None else named(value)


def calibration_for(method: str, files: CalibrationCache, value: object) -> CalibrationFile:
    """The open file that `calibration` names; RainMergeError unless it is one for the method."""
    with reported():
        calibration = value if isinstance(value, CalibrationFile) else _open(method, files, value)
        if calibration.kind != method:
            raise RainError(
                f"calibration file {calibration.path!r} is for merge_method: {calibration.kind}, "
                f"not {method}; correct `parameters.calibration`, or calibrate again"
            )
    return calibration


def _open(method: str, files: CalibrationCache, value: object) -> CalibrationFile:
    if isinstance(value, (str, PathLike)) and str(value):
        return files.open(str(fspath(value)))
    raise RainError(
        f"merge_method: {method} needs `parameters: {{calibration: PATH}}`, the file that "
        "`mergekit-rain calibrate CONFIG` writes" + (f"; found {shown(value)}" if value else "")
    )


# mergekit silently ignores parameters that a method does not have.
_MISTAKEN = (
    *("lamda", "lamba", "lambd", "lambada", "lamdba", "lmbda", "Lambda", "LAMBDA", "λ"),
    *("strength", "scale", "alpha", "weight", "density", "normalize", "rescale", "t"),
    *("gamma", "epsilon", "calib", "calibration_file", "Role", "roles"),
    *("calibration", "role", "omega", "ratio", "Weight", "weights"),
)


def mistaken_names(own: Sequence[str], known: str) -> tuple[ParameterSpec, ...]:
    """Parameters that refuse what is written by mistake; `own` are real, `known` tells of them."""
    return tuple(
        checked_parameter(name, object, ParameterScope.NON_BASE, None, _refusal(name, known))
        for name in _MISTAKEN
        if name not in own
    )


def _refusal(name: str, known: str) -> Callable[[Any], None]:
    """A check that refuses any value of that parameter."""

    def refuse(value: object) -> None:
        if value is not None:
            raise RainMergeError(
                f"unknown parameter {name!r}: mergekit would ignore it (known: {known})"
            )

    return refuse
