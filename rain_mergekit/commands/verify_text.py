"""The lines that `mergekit-rain verify` prints; without heavy imports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rain_mergekit.system.wording import counted

if TYPE_CHECKING:
    from rain_mergekit.evaluation.answers import Behaviour
    from rain_mergekit.evaluation.divergence import Drift
    from rain_mergekit.evaluation.layerwise_drift import LayerDrift, SiteDrift
    from rain_mergekit.evaluation.verify import VerificationResult


MOST_LAYERS = 12
_CURE = (
    "lower `lambda` or protect more (rank_share, max_rank); with fit: streams lower "
    "`teacher_strength` or calibrate on more samples"
)
MEANING = {
    "kept": "the thinking format is kept",
    "at risk": "the thinking format is at risk: generate some answers before using it (--generate)",
    "damaged": f"the thinking format is damaged: expect missing close markers; {_CURE}",
}


def verification_lines(found: VerificationResult, *, all_of_them: bool) -> Iterator[str]:
    """All that was measured on texts; of many layers a few, unless all are wanted."""
    yield from drift_lines(found.drift)
    yield from layer_lines(found.layers, all_of_them=all_of_them)
    yield from rounding_lines(found)


def drift_lines(found: Drift) -> Iterator[str]:
    """The KL divergence by place, as lines."""
    places = (
        ("L_think", found.think, "the markers and the tokens around them"),
        ("L_mid", found.content, "inside the thinking block"),
        ("L_rest", found.rest, "prompt and response"),
    )
    yield f"Mean KL divergence from the reasoning model, {counted(found.samples, 'sample')} (nats):"
    for name, place, text in places:
        yield f"  {name:<8} {place.mean:<10.3g} {place.positions:>7} positions, {text}"
    yield f"  worst sample at think positions: {found.worst_source} ({found.worst:.3g})"


def verdict_line(verdict: str, answers: Mapping[str, Behaviour]) -> str:
    """The verdict in words; by what was seen in answers, where they are the reason."""
    found = reasons(answers)
    if not found:
        return MEANING[verdict]
    cure = "" if verdict == "at risk" else f"; {_CURE}"
    return f"{verdict}: its answers are worse than before ({', '.join(found)}){cure}"


def reasons(answers: Mapping[str, Behaviour]) -> list[str]:
    """What is worse in the merged model's answers beyond chance, with both numbers."""
    from rain_mergekit.evaluation.answers import longer, worse  # noqa: PLC0415 - imports scipy

    if not answers:
        return []
    merged, own = answers["merged"], answers["reasoning"]
    found = [
        f"{count.name} {count.found(merged)} of {count.of(merged)}, before {count.found(own)} of "
        f"{count.of(own)}"
        for count in worse(merged, own)
    ]
    if longer(merged, own):
        found.append(f"tokens of the typical answer {merged.middle:.0f}, before {own.middle:.0f}")
    return found


def layer_lines(layers: Sequence[LayerDrift], *, all_of_them: bool) -> Iterator[str]:
    """Drift of the features, a line a layer; of many layers evenly spaced ones and the last."""
    sites = list(dict.fromkeys(site for layer in layers for site in layer))
    yield "Drift of the inputs of linear modules at think positions, |H* - H| / |H| in percent:"
    yield f"  {'layer':>5} " + " ".join(f"{_short(site):>10}" for site in sites)
    step = 1 if all_of_them else -(-len(layers) // MOST_LAYERS)
    for index, layer in enumerate(layers):
        if (len(layers) - 1 - index) % step == 0:
            cells = (_percent(layer.get(site)) for site in sites)
            yield f"  {index:>5} " + " ".join(f"{cell:>10}" for cell in cells)


def rounding_lines(found: VerificationResult) -> Iterator[str]:
    """How much of the drift comes from rounding the merged weights."""
    if found.unrounded is None:
        yield f"Rounding's part of the drift is not known: {found.unknown}"
        return
    last = found.layers[-1].values()
    drift = sum(site.drift for site in last)
    share = sum(site.rounding or 0.0 for site in last) / drift if drift else 0.0
    yield (
        f"Rounding the merged weights makes up {100 * share:.2g} % of the drift's energy in the "
        f"last layer; without it L_think is {found.unrounded.think.mean:.3g}"
    )


def behaviour_lines(found: Mapping[str, Behaviour]) -> Iterator[str]:
    """What the models wrote, side by side."""
    first = next(iter(found.values()))
    yield f"Answers to {counted(first.prompts, 'prompt')}, greedy:"
    yield f"  {'':<34}" + "".join(f"{name:>12}" for name in found)
    rows: list[tuple[str, list[str]]] = [
        ("without a thinking block", [str(one.unopened) for one in found.values()]),
        ("close marker missing", [str(one.unclosed) for one in found.values()]),
        ("nothing in the block", [str(one.empty) for one in found.values()]),
        ("cut off while thinking", [str(one.cut) for one in found.values()]),
        ("more than one block", [str(one.several) for one in found.values()]),
        ("loops", [str(one.looped) for one in found.values()]),
        ("other language than the prompt", [str(one.switched) for one in found.values()]),
        ("mean thinking length, tokens", [_mean(one.tokens) for one in found.values()]),
        ("mean length of the answer, tokens", [_mean(one.length) for one in found.values()]),
    ]
    if first.keys:
        rows.append(("right answers", [f"{one.correct}/{one.keys}" for one in found.values()]))
    if first.asked:
        pairs = [(f"{one.followed}/{one.instructions}") for one in found.values()]
        rows.append(("instructions followed", pairs))
        rows.append(
            ("prompts with all followed", [f"{one.obedient}/{one.asked}" for one in found.values()])
        )
    if first.bound:
        rows.append(("thinking as told", [f"{one.heeded}/{one.bound}" for one in found.values()]))
    for name, cells in rows:
        yield f"  {name:<34}" + "".join(f"{cell:>12}" for cell in cells)


def content(
    verdict: str, found: VerificationResult | None, answers: Mapping[str, Behaviour]
) -> dict[str, Any]:
    """Everything that was measured as plain values, for `--json`."""
    divergence = None
    if found is not None:
        divergence = {
            "drift": asdict(found.drift),
            "layers": [
                {site: one.relative for site, one in layer.items()} for layer in found.layers
            ],
            "unrounded": None if found.unrounded is None else asdict(found.unrounded),
            "unrounded_unknown": found.unknown,
        }
    drift = None if found is None else found.drift
    return {
        "verdict": verdict,
        "measured": measured(drift, answers),
        "worse": reasons(answers),
        "divergence": divergence,
        "answers": {name: asdict(one) for name, one in answers.items()},
    }


def measured(drift: Drift | None, found: Mapping[str, Behaviour]) -> str:
    """What the verdict rests on, in one line."""
    parts = [] if drift is None else [f"L_think {drift.think.mean:.3g}"]
    if found:
        merged, own = found["merged"], found["reasoning"]
        parts.append(f"broken blocks {merged.broken} of {merged.prompts} (before {own.broken})")
        parts.append(f"loops {merged.looped} (before {own.looped})")
        if own.length:
            parts.append(f"tokens {100 * (merged.length / own.length - 1):+.0f} %")
        if own.keys:
            parts.append(f"right {merged.correct} of {merged.keys} (before {own.correct})")
        if own.asked:
            parts.append(f"followed {merged.obedient} of {merged.asked} (before {own.obedient})")
        if own.bound:
            parts.append(
                f"thinking as told {merged.heeded} of {merged.bound} (before {own.heeded})"
            )
    else:
        parts.append("answers not measured (--generate)")
    return "; ".join(parts)


def _short(site: str) -> str:
    """`self_attn.q_proj` -> `q_proj`."""
    return site.rpartition(".")[2]


def _percent(found: SiteDrift | None) -> str:
    return "-" if found is None else f"{100 * found.relative:.3g}"


def _mean(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
