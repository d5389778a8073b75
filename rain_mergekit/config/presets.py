"""Named groups of settings: the paper's, and the nearest to its published scripts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A named group of settings; limits: how a merge with them still differs from that name."""

    settings: Mapping[str, Any]
    limits: tuple[str, ...]


# Markers alone, the output head left, and bounds of the coefficients as the scripts have them.
_BOTH = {
    "later_turns": 0.0,
    "fit": "projection",
    "gamma": 0.0,
    "projection": "orthogonal",
    "ridge": 0.0,
    "window": 5,
    "protect_thinking": 0.0,
    "protect_prompt": 0.0,
    "protect_response": 0.0,
    "reading_share": 0.0,
    "lm_head": "off",
    "coefficients": "closed_form",
    "alpha_min": 0.0,
    "alpha_max": 1.5,
    "leakage_from_thinking": False,
}
_SPAN = (
    "the paper protects everything that the features span (rank_by: full), which leaves little or "
    "nothing to merge; the share of 0.9 is this package's"
)
_DEFAULTS = "rho and the bounds of the coefficients are the defaults of the published scripts"
_READOUTS = (
    "the scripts keep a few readouts in random directions, which leaves 0.88 to 1.00 of the task "
    "vector's effect at the markers; one direction for each site, kept for all outputs, is the "
    "least that can be set here"
)
_HEADS = (
    "the scripts take head h modulo the number of key/value heads and add the task vector once for "
    "each query head; here each key/value head gets it once"
)
_COEFFICIENTS = (
    "the scripts' coefficients rest on attention between prompt tokens, off by one, and on a "
    "leakage that vanishes (so rho is 0); `mergekit-rain convert-alpha` takes over a file of theirs"
)
_PAPER = {**_BOTH, "rank_by": "energy", "rank_share": 0.9, "rho": 0.5}
_PUBLISHED = {**_BOTH, "rank_by": "count", "rank_count": 1, "rho": 0.0}
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "paper": Preset(_PAPER, (_SPAN, _DEFAULTS)),
        "published": Preset(_PUBLISHED, (_READOUTS, _HEADS, _COEFFICIENTS)),
    }
)


def expanded(section: Any) -> Any:
    """The `rain:` section with its preset's settings where it gives none of its own."""
    found = preset_of(section)
    return section if found is None else {**found.settings, **section}


def preset_of(section: object) -> Preset | None:
    """The preset that a section, or the settings of a calibration file, names."""
    name = section.get("preset") if isinstance(section, Mapping) else None
    return PRESETS.get(name) if isinstance(name, str) else None


def beside(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings of the preset that have another value, as a calibration file records them."""
    found = preset_of(settings)
    if found is None:
        return ()
    return tuple(n for n, value in found.settings.items() if settings.get(n, value) != value)
