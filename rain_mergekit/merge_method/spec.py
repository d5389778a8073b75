"""How `merge_method: rain` presents itself to mergekit: parameters, inputs, errors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
    ParameterSpec,
)

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.config.roles import OTHER
from rain_mergekit.errors import RainError
from rain_mergekit.system.untrusted_input import finite_number


@dataclass(frozen=True)
class Card:
    """What a method is called: in YAML, in print, and where its paper is."""

    name: str
    title: str
    paper: str


class RainMergeError(RainError, click.ClickException):
    """What stops a merge; mergekit's commands print it as one `Error:` and exit with 1."""


@contextmanager
def reported() -> Iterator[None]:
    """Turn RainError into the kind that mergekit's commands print."""
    try:
        yield
    except RainMergeError:
        raise
    except RainError as error:
        raise RainMergeError(str(error)) from error


class Planned(threading.local):
    """The parameters that mergekit has resolved for the tensor that it is planning.

    mergekit shows a method its parameters one by one and its models separately; the two meet only
    when a tensor is merged. Collecting them lets a plan that cannot work fail while planning.
    """

    calibration: CalibrationFile | None = None
    roles: tuple[str | None, ...] = ()

    def take(self) -> tuple[CalibrationFile | None, tuple[str | None, ...]]:
        """Return what was collected, and clear it."""
        collected = (self.calibration, self.roles)
        self.calibration, self.roles = None, ()
        return collected


@dataclass(frozen=True)
class _Checked(ParameterSpec):  # type: ignore[misc] # mergekit publishes no types
    """Optional for mergekit, whose own message for a missing parameter is a traceback."""

    check: Callable[[Any], Any] = str

    def validate(self, value: Any) -> Any:
        return self.check(value)


def rain_spec(
    card: Card, open_calibration: Callable[[Any], Any], role: Callable[[Any], Any]
) -> Any:
    """The method's MergeMethodSpec; both functions check a value and return what to use."""
    shared, non_base = ParameterScope.SHARED, ParameterScope.NON_BASE
    return MergeMethodSpec(
        name=card.name,
        pretty_name=card.title,
        reference_url=card.paper,
        parameters=(
            checked_parameter("calibration", str, shared, None, open_calibration),
            checked_parameter("lambda", float, shared, 1.0, strength),
            checked_parameter("role", str, non_base, None, role),
            *mistaken_names(("calibration", "lambda", "role"), _KNOWN),
        ),
        # An optional tensor of one input is the base's own or is left out; see validate_inputs.
        contract=InputContract(BasePolicy.REQUIRED, min_inputs=2, min_non_base=1, max_non_base=2),
        optional_tensor_policy=OptionalTensorPolicy.BASE_OR_SKIP,
    )


def checked_parameter(
    name: str, kind: type, scope: ParameterScope, default: object, check: Callable[[Any], Any]
) -> ParameterSpec:
    """A parameter with a check of its own, which gives the value to use."""
    return _Checked(name, kind, scope, default=default, check=check)


_KNOWN = "calibration and lambda for all, and each model's role"
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


def strength(value: object) -> float:
    """λ as a finite float."""
    number = finite_number(value)
    if number is None:
        raise RainMergeError(f"lambda must be a finite number, found {value!r:.80}")
    return number


def role_name(value: object) -> str | None:
    """`instruct`, `pretrained`, or None."""
    if value is not None and value not in tuple(OTHER):
        raise RainMergeError(f"role must be instruct or pretrained, found {value!r}")
    return None if value is None else str(value)


def require_kind(calibration: CalibrationFile, method: str) -> None:
    """RainError if the calibration file is for another merge method."""
    if calibration.kind != method:
        raise RainError(
            f"calibration file {calibration.path!r} is for merge_method: {calibration.kind}, not "
            f"{method}; correct `parameters.calibration`, or calibrate again"
        )


def require_inputs(
    method: str,
    ids: Sequence[Hashable],
    base: Hashable | None,
    group: str | None,
) -> None:
    """RainError unless there is a base model and no model is given twice."""
    if base is None:
        raise RainError(f"merge_method: {method} needs `base_model`, the reasoning model")
    where = f" ({group})" if group else ""
    if base not in ids:
        raise RainError(f"the reasoning model (base_model {base}) is not among the inputs{where}")
    require_once(ids, where)


def require_once(ids: Sequence[Hashable], where: str) -> None:
    """RainError if a model is given twice; `where` ends the message."""
    if len(set(ids)) != len(ids):
        twice = sorted({str(model) for model in ids if list(ids).count(model) > 1})
        raise RainError(f"given more than once: {', '.join(twice)}{where}")
