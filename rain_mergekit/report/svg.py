"""Embed matplotlib's SVG in a page: unique ids, and colours that follow the page."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Placeholder colours, replaced by the page's own, which differ in light and dark mode.
INK, FAINT = "#010203", "#040506"
_PAGE_COLOURS = {INK: "var(--ink)", FAINT: "var(--faint)"}
_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_OURS = re.compile(r"url\(#([^)]*)\)")
STYLE: Any = {  # matplotlib types the keys one by one
    "svg.fonttype": "none",  # text stays text: it can be read aloud, found and copied
    "svg.hashsalt": "rain",  # the same figure gives the same bytes
    "font.size": 10.0,
    "axes.titlesize": 10.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "text.parse_math": False,  # names hold what they hold, also dollar signs
}


def inline(figure: Figure, prefix: str, description: str) -> str:
    """The figure as an `<svg>` element; `prefix` makes its ids differ from other figures'."""
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _LINK)
    root = ET.fromstring(buffer.getvalue())  # noqa: S314 - matplotlib's own output
    for found in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(found)
    for element in root.iter():
        for name, value in element.attrib.items():
            element.set(name, _adapted(name, value, prefix))
    root.attrib.pop("width", None)
    root.attrib.pop("height", None)
    root.set("role", "img")
    root.set("aria-label", description)
    return ET.tostring(root, encoding="unicode")


def _adapted(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return f"{prefix}-{value}"
    if name.endswith("href") and value.startswith("#"):
        return f"#{prefix}-{value[1:]}"
    value = _OURS.sub(rf"url(#{prefix}-\1)", value)
    for drawn, shown in _PAGE_COLOURS.items():
        value = value.replace(drawn, shown)
    return re.sub(r"font: ([0-9.]+px) [^;]*", r"font: \1 system-ui, sans-serif", value)
