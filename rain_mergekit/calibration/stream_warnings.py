"""What a user should know of a finished stream matching before merging with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from rain_mergekit.calibration.expert_entries import fits
from rain_mergekit.calibration.expert_fit import LEAST_TOKENS

# Held-out texts are always somewhat worse; a larger ratio means too few samples.
_FACTOR, _MARGIN = 2.0, 0.05
_KEPT = 0.9  # of the fitted energy: what a rank cap may cut without a word


def stream_warnings(
    layers: Sequence[Mapping[str, Any]], tensors: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Groups of tokens whose held-out error is far above the fitted one, and ranks cut short.

    layers: of each, `fitted` and `held_out` errors by group; tensors: the file's entries.
    """
    for group in sorted({name for layer in layers for name in layer["held_out"]}):
        pairs = [
            (layer["fitted"][group], layer["held_out"][group])
            for layer in layers
            if group in layer["held_out"] and group in layer["fitted"]
        ]
        if not pairs:
            continue
        fitted, held_out = (fmean(values) for values in zip(*pairs, strict=True))
        if held_out > _FACTOR * fitted + _MARGIN:
            yield (
                f"at {group} the merged hidden states are {held_out:.0%} away from their teacher "
                f"on texts that were held out, and {fitted:.0%} on those that were fitted: use "
                "more samples"
            )
    changes = dict(fits(tensors))
    cut = [name for name, fit in changes.items() if fit["rank"] < fit["wanted"]]
    kept = fmean(changes[name]["explained"] for name in cut) if cut else 1.0
    if kept < _KEPT:
        yield (
            f"{len(cut)} of {len(changes)} changes reached the rank cap (the first: {cut[0]}) and "
            f"keep {kept:.0%} of the fitted energy on average; a larger `size_budget` or "
            "`max_rank` keeps more"
        )
    yield from _experts(layers)


def _experts(layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Experts that stay the reasoning model's, as too few tokens reach them or none of it helps."""
    found = [
        (f"{layer['name']}.{module}", one)
        for layer in layers
        for module, one in layer.get("experts", {}).items()
    ]
    count = sum(len(one["tokens"]) for _, one in found)
    few = [f"{name}, expert {e}" for name, one in found for e in one["few"]]
    if few:
        yield (
            f"fewer than {LEAST_TOKENS} fitted tokens were routed to {len(few)} of {count} experts "
            f"(the first: {few[0]}): these stay the reasoning model's; more samples reach more of "
            "them"
        )
    worse = [
        f"{name}.{weight}, expert {e}"
        for name, one in found
        for weight, experts in one["worse"].items()
        for e in experts
    ]
    if worse:
        yield (
            f"{len(worse)} of the experts' weights (the first: {worse[0]}) stay the reasoning "
            "model's, as a change would be worse on the texts that were held out; more samples "
            "make more of them fit"
        )
