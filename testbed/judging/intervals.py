"""Point estimates with bootstrap intervals, single and paired; no model and no torch in here.

Every number of the scoreboard is a ratio Σ value / Σ weight over prompts: a share has weight 1
where a prompt counts and 0 elsewhere, a mean KL has the number of positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SEEDS = (0, 1, 2)
RESAMPLES = 1000
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Ratio:
    """Σ values / Σ weights, both one number per prompt."""

    values: Numbers
    weights: Numbers

    def estimate(self, counts: Numbers | None = None) -> Numbers:
        """The ratio, or one per row of counts (resamples x prompts)."""
        taken = np.ones((1, len(self.values))) if counts is None else counts
        weights: Numbers = taken @ self.weights
        shares = np.full(len(weights), np.nan)
        np.divide(taken @ self.values, weights, out=shares, where=weights > 0)
        return shares


def resamples(
    strata: Sequence[object], seeds: Sequence[int] = SEEDS, each: int = RESAMPLES
) -> Numbers:
    """How often each prompt is drawn, (seeds · each) x prompts; strata keep their sizes."""
    labels = np.array([str(label) for label in strata])
    counts = np.zeros((len(seeds) * each, len(labels)))
    for stratum in sorted(set(labels)):
        members = np.flatnonzero(labels == stratum)
        even = np.full(len(members), 1 / len(members))
        drawn = [
            np.random.default_rng(seed).multinomial(len(members), even, each) for seed in seeds
        ]
        counts[:, members] = np.concatenate(drawn)
    return counts


def halves(strata: Sequence[object], seeds: Sequence[int] = SEEDS) -> Numbers:
    """One random half of the prompts per seed, stratum by stratum."""
    labels = np.array([str(label) for label in strata])
    counts = np.zeros((len(seeds), len(labels)))
    for row, seed in enumerate(seeds):
        rng = np.random.default_rng(seed)
        for stratum in sorted(set(labels)):
            members = np.flatnonzero(labels == stratum)
            counts[row, rng.permutation(members)[: (len(members) + 1) // 2]] = 1
    return counts


def interval(ratio: Ratio, counts: Numbers) -> tuple[float, float]:
    """The central 95 % of the resampled estimates."""
    low, high = np.nanpercentile(ratio.estimate(counts), [2.5, 97.5])
    return float(low), float(high)


def difference(first: Ratio, second: Ratio, counts: Numbers) -> tuple[float, float, float]:
    """first - second on the same prompts, with the central 95 % of its paired resamples."""
    apart = first.estimate(counts) - second.estimate(counts)
    low, high = np.nanpercentile(apart, [2.5, 97.5])
    return float((first.estimate() - second.estimate())[0]), float(low), float(high)


def packed(bits: Sequence[bool]) -> str:
    """Yes and no per prompt as hexadecimal digits."""
    return f"{len(bits)}:{np.packbits(np.array(bits, dtype=bool)).tobytes().hex()}"


def unpacked(text: str) -> Numbers:
    """What `packed` packed, as 0.0 and 1.0."""
    length, _, digits = text.partition(":")
    raw = np.frombuffer(bytes.fromhex(digits), dtype=np.uint8)
    return np.unpackbits(raw)[: int(length)].astype(np.float64)


def described(
    ratios: Mapping[str, Ratio], strata: Sequence[object]
) -> dict[str, dict[str, float | list[float]]]:
    """Estimate, interval and the estimates on random halves, by name."""
    counts, parts = resamples(strata), halves(strata)
    found: dict[str, dict[str, float | list[float]]] = {}
    for name, ratio in ratios.items():
        if ratio.weights.any():
            found[name] = {
                "value": float(ratio.estimate()[0]),
                "interval": list(interval(ratio, counts)),
                "halves": [float(value) for value in ratio.estimate(parts)],
            }
    return found
