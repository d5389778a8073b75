"""How `merge_method: rain` presents itself to mergekit: parameters and inputs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
)

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.errors import RainError
from rain_mergekit.merge_method.parameters import (
    checked_parameter,
    mistaken_names,
    number,
    shared,
)

_KNOWN = "calibration and lambda for all, and each model's role"


@dataclass(frozen=True)
class Card:
    """What a method is called: in YAML, in print, and where its paper is."""

    name: str
    title: str
    paper: str


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


def rain_spec(
    card: Card, open_calibration: Callable[[Any], Any], role: Callable[[Any], Any]
) -> Any:
    """The method's MergeMethodSpec; both functions check a value and return what to use."""
    return MergeMethodSpec(
        name=card.name,
        pretty_name=card.title,
        reference_url=card.paper,
        parameters=(
            shared("calibration", None, open_calibration, str),
            shared("lambda", 1.0, number("lambda")),
            checked_parameter("role", str, ParameterScope.NON_BASE, None, role),
            *mistaken_names(("calibration", "lambda", "role"), _KNOWN),
        ),
        # An optional tensor of one input is the base's own or is left out; see validate_inputs.
        contract=InputContract(BasePolicy.REQUIRED, min_inputs=2, min_non_base=1, max_non_base=2),
        optional_tensor_policy=OptionalTensorPolicy.BASE_OR_SKIP,
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
