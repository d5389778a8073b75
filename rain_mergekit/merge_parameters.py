"""What of mergekit's part of a configuration only the merge would stumble over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergekit.common import dtype_from_name
from mergekit.config import ConditionalParameter, MergeConfiguration

from rain_mergekit.errors import RainError
from rain_mergekit.inputs import finite_number, shown

_GLOBAL, _OF_A_MODEL = ("calibration", "lambda"), ("role",)


def check_merge(merge: MergeConfiguration, source: str) -> None:
    """RainError for parameters that rain has not, for a lambda that is no number, and for types."""
    _require_known(merge.parameters, _GLOBAL, f"{source}: parameters")
    for item in merge.models or ():
        _require_known(item.parameters, _OF_A_MODEL, f"{source}: {item.model}: parameters")
    for value in _values((merge.parameters or {}).get("lambda", 1.0)):
        if finite_number(value) is None:
            raise RainError(
                f"{source}: parameters: lambda must be a finite number, found {value!r:.80}"
            )
    for field in ("dtype", "out_dtype"):
        _require_type(getattr(merge, field), f"{source}: {field}")


def _require_known(found: Mapping[str, Any] | None, known: tuple[str, ...], where: str) -> None:
    """mergekit does not ask a method for names that it does not know: they would do nothing."""
    for name in found or ():
        if name not in known:
            raise RainError(
                f"{where}: rain has no parameter {shown(name)} here, it would do nothing (known: "
                f"{', '.join(known)}; `role` belongs to a model, `lambda` to all of them)"
            )


def _values(value: Any) -> Iterator[Any]:
    """The numbers of a gradient, and those of a list of filters."""
    if isinstance(value, ConditionalParameter):
        yield from _values(value.value)
    elif isinstance(value, list):
        for item in value:
            yield from _values(item)
    else:
        yield value


def _require_type(name: str | None, where: str) -> None:
    try:
        dtype_from_name(name)
    except RuntimeError:
        raise RainError(
            f"{where} is {shown(name)}, expected a type that mergekit knows, such as bfloat16, "
            "float16 or float32"
        ) from None
