"""The table of docs/settings.md, from RainSettings, and what it says of the presets.

`python tests/support/settings_table.py` writes it.

Names, types, limits and defaults come from the JSON schema that pydantic derives, so the table
says what the code accepts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from rain_mergekit.config.presets import PRESETS
from rain_mergekit.config.settings import RainSettings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
BEGIN = "<!-- made from rain_mergekit/config/settings.py: begin -->\n"
END = "<!-- made from rain_mergekit/config/settings.py: end -->\n"
PRESETS_BEGIN = "<!-- presets, made from rain_mergekit/config/presets.py: begin -->\n"
PRESETS_END = "<!-- presets: end -->\n"
_WORDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true, false"}
_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def table() -> str:
    """The Markdown table, one row a setting."""
    schema = RainSettings.model_json_schema()
    rows = ["| setting | value | default | meaning |", "|---|---|---|---|"]
    for name, value, default, meaning in _rows(schema["properties"], required(schema)):
        rows.append(f"| `{name}` | {value} | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def required(schema: Mapping[str, Any]) -> frozenset[str]:
    """The settings without a default."""
    return frozenset(schema.get("required", ()))


def _rows(fields: Mapping[str, Any], needed: frozenset[str]) -> Iterator[tuple[str, str, str, str]]:
    for name, field in fields.items():
        default = "required" if name in needed else f"`{_yaml(field['default'])}`"
        yield name, _value(field), default, field["description"]


def _value(field: Mapping[str, Any]) -> str:
    """The type, choices and limits in words."""
    choices = field.get("anyOf") or field.get("oneOf") or [field]
    parts = [_one(choice) for choice in choices]
    return ", or ".join(parts)


def _one(choice: Mapping[str, Any]) -> str:
    if "enum" in choice:
        return ", ".join(f"`{item}`" for item in choice["enum"])
    if "const" in choice:
        return f"`{choice['const']}`"
    if choice.get("type") == "array" and "$ref" in choice["items"]:
        return "`{open: text, close: text}`, or a list of these"
    if choice.get("type") == "array":
        return f"list of {_one(choice['items'])}"
    if "$ref" in choice or choice["type"] in ("null", "object"):
        return "null" if choice.get("type") == "null" else "mapping"
    limits = [f"{sign} {choice[key]:g}" for key, sign in _LIMITS.items() if key in choice]
    return " ".join([_WORDS[choice["type"]], ", ".join(limits)]).strip()


def _yaml(value: object) -> str:
    text = str(yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=200))
    return text.removesuffix("\n").removesuffix("\n...").strip("'")


def presets() -> str:
    """The settings of each preset in a table, and where it is not what it is named after."""
    names = list(dict.fromkeys(name for one in PRESETS.values() for name in one.settings))
    lines = ["| setting | " + " | ".join(f"`{name}`" for name in PRESETS) + " |"]
    lines.append("|---" * (len(PRESETS) + 1) + "|")
    for name in names:
        values = [one.settings.get(name) for one in PRESETS.values()]
        cells = ["" if value is None else f"`{_yaml(value)}`" for value in values]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    for name, one in PRESETS.items():
        lines += ["", f"Where `{name}` differs from what it is named after:", ""]
        lines += [f"- {text}." for text in one.limits]
    return "\n".join(lines) + "\n"


def parts(text: str, begin: str = BEGIN, end: str = END) -> tuple[str, str, str]:
    """Split the page into what is before, in, and after a part made by this."""
    before, _, rest = text.partition(begin)
    inside, _, after = rest.partition(end)
    return before, inside, after


def write() -> None:
    """Put both into their places on the page."""
    text = PAGE.read_text(encoding="utf-8")
    made = ((BEGIN, END, table()), (PRESETS_BEGIN, PRESETS_END, presets()))
    for begin, end, content in made:
        before, _, after = parts(text, begin, end)
        text = f"{before}{begin}{content}{end}{after}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
