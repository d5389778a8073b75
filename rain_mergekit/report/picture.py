"""What the pictures of the report have in common."""

from __future__ import annotations

from dataclasses import dataclass

from rain_mergekit.calibration_file.site_names import Kind


@dataclass(frozen=True)
class Picture:
    """One SVG with the title and the name of the caption in the template."""

    svg: str
    title: str
    caption: str


def module_names(kind: Kind) -> str:
    """The modules that share this kind of input, or the kind's own name where it has none."""
    return " ".join(kind.modules) or kind.name
