"""The section of the model card that describes a merge without calibration."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

from mergekit import merge_methods

from rain_mergekit.config.plain_merge import PlainMerge
from rain_mergekit.errors import RainError
from rain_mergekit.evaluation.verification_record import VerificationRecord
from rain_mergekit.report.card_text import USAGE, code, measurement, model_link, two_columns


def plain_section(merge: PlainMerge, measured: VerificationRecord | None) -> str:
    """Method, models, parameters and measurement, as Markdown; RainError for an unknown method."""
    try:
        spec = merge_methods.get(merge.method).spec
    except RuntimeError:
        raise RainError(
            f"merge_method is {merge.method!r:.80}, which mergekit does not know"
        ) from None
    title = spec.pretty_name or spec.name
    name = f"[{title}]({spec.reference_url})" if spec.reference_url else title
    others = [model_link(str(model)) for key, model in merge.models.items() if key != "base"]
    into = f" into {model_link(str(merge.base))}" if "base" in merge.models else ""
    intro = f"{' and '.join(others)}, merged{into} by {name} with mergekit."
    rows = [*_rows(merge), *(measurement(measured) if measured else ())]
    return f"## {title}\n\n{intro}\n\n{two_columns(rows)}\n\n{USAGE}"


def _rows(merge: PlainMerge) -> Iterator[tuple[str, str]]:
    yield "merge_method", code(merge.method)
    for role, model in merge.models.items():
        own = merge.own.get(role)
        yield role, model_link(str(model)) + (f", {code(json.dumps(own))}" if own else "")
    for name, value in merge.parameters.items():
        # A calibration's name alone: the folders of whoever merged are of no use to a reader.
        shown = os.path.basename(str(value)) if name == "calibration" else value
        yield code(name), code(json.dumps(shown, default=str))
