"""Pages from the package's templates: everything in them is escaped but our own SVG."""

from __future__ import annotations

from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup


def fill(name: str, **values: Any) -> str:
    """The template of that name as HTML; a value that it lacks is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inline"] = _markup
    return environment.get_template(name).render(**values).lstrip()


def _source(name: str) -> str:
    return (resources.files("rain_mergekit.report") / name).read_text(encoding="utf-8")


def _markup(svg: str) -> Markup:
    """Mark our own SVG as safe; everything else on the page is escaped."""
    return Markup(svg)  # noqa: S704 - serialised by ElementTree, which escapes all text in it
