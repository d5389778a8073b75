"""What a user should know of a finished stream matching before merging with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

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
    cut = [n for n, t in tensors.items() if "fit" in t and t["fit"]["rank"] < t["fit"]["wanted"]]
    kept = fmean(tensors[name]["fit"]["explained"] for name in cut) if cut else 1.0
    if kept < _KEPT:
        yield (
            f"{len(cut)} of {len(tensors)} changes reached the rank cap (the first: {cut[0]}) and "
            f"keep {kept:.0%} of the fitted energy on average; a larger `size_budget` or "
            "`max_rank` keeps more"
        )
