"""The section of the model card that describes a RegMean merge."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from rain_mergekit.calibration_file.summary import FileSummary
from rain_mergekit.config.roles import is_proxy
from rain_mergekit.evaluation.verification_record import VerificationRecord
from rain_mergekit.report.card_text import (
    USAGE,
    code,
    data_rows,
    measurement,
    model_link,
    opening_rows,
    two_columns,
)

_INTRO = """\
{reasoning} with what {instruct} has learnt, merged by [RegMean](https://arxiv.org/abs/2212.09849)
with rain-mergekit. In every linear map of the decoder layers the change is the one that least
disturbs either model on its own set of texts, by the second moments G of the map's inputs; all
other weights are the reasoning model's:

    W = W_reasoning + λ · Δ · G_I (G_I + s G_R)⁻¹,    Δ = W_instruct − W_{origin}"""  # noqa: RUF001


def regmean_section(
    strength: Any, summary: FileSummary, measured: VerificationRecord | None
) -> str:
    """Models, strength, weight, data, ranks and measurement, as Markdown."""
    models = summary.models
    intro = _INTRO.format(
        reasoning=model_link(models["reasoning"]),
        instruct=model_link(models["instruct"]),
        origin="reasoning" if is_proxy(models) else "pretrained",
    )
    rows = [*_rows(strength, summary), *(measurement(measured) if measured else ())]
    return f"## RegMean\n\n{intro}\n\n{two_columns(rows)}\n\n{USAGE}"


def _rows(strength: Any, summary: FileSummary) -> Iterator[tuple[str, str]]:
    yield from opening_rows(strength, summary)
    settings = summary.settings.get("regmean")
    weight = settings.get("thinking_weight") if isinstance(settings, dict) else None
    yield "weight s of the reasoning set", code("not recorded" if weight is None else weight)
    yield from data_rows(summary)
    if summary.sites:
        ranks = fmean(site.rank for site in summary.sites)
        kept = fmean(1.0 if site.response is None else site.response for site in summary.sites)
        text = f"mean rank {ranks:.1f} over {len(summary.sites)} input sites"
        yield "stored directions", f"{text}, {kept:.3f} of what all of them gain"
    yield "calibrated with", code(summary.created_by)
