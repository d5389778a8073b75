"""Check parameters of mergekit that mergekit itself checks late or never."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from mergekit.common import dtype_from_name
from mergekit.config import ConditionalParameter, MergeConfiguration

from rain_mergekit.config.listed_models import ListedModels
from rain_mergekit.config.methods import PARAMETERS
from rain_mergekit.errors import RainError
from rain_mergekit.system.untrusted_input import finite_number, shown
from rain_mergekit.system.wording import did_you_mean

TYPE_FIELDS = ("dtype", "out_dtype")


def check_merge(merge: MergeConfiguration, listed: ListedModels, source: str) -> None:
    """Check lambda, types and parameter names now: mergekit would fail only during the merge."""
    of_all, of_each = PARAMETERS[merge.merge_method]
    _require_known(merge.parameters, of_all, f"{source}: parameters")
    for item in listed.models:
        _require_known(item.parameters, of_each, f"{source}: {item.model}: parameters")
    strengths = [(merge.parameters or {}).get("lambda", 1.0), *listed.strengths.values()]
    for value in chain.from_iterable(map(_values, strengths)):
        if finite_number(value) is None:
            raise RainError(
                f"{source}: parameters: lambda must be a finite number, found {value!r:.80}"
            )
    for field in TYPE_FIELDS:
        _require_type(getattr(merge, field), f"{source}: {field}")


def _require_known(found: Mapping[str, Any] | None, known: tuple[str, ...], where: str) -> None:
    """Refuse unknown parameter names, which mergekit would ignore."""
    for name in found or ():
        if name not in known:
            meant = did_you_mean(str(name), known)
            raise RainError(
                f"{where}: unknown parameter {shown(name)}{meant}: mergekit "
                "would ignore it (known here: "
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
