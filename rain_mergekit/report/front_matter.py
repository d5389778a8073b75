"""The YAML block at the head of a model card: tags are added as text, the rest stays as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import yaml

from rain_mergekit.errors import RainError
from rain_mergekit.system.untrusted_input import load_yaml, shortened

_BLOCK = re.compile(r"\A\ufeff?---[ \t]*\r?\n(?P<yaml>(?:.*\n)*?)---[ \t]*(?:\r?\n|\Z)")


def with_tags(text: str, tags: Sequence[str]) -> str:
    """The card with these tags in its front matter; those that are there are not repeated.

    Comments, order and style of the block stay. RainError if it is not YAML that can be added to.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    found = _BLOCK.match(text)
    if found is None:
        lines = ["---", "tags:", *(f"- {tag}" for tag in tags), "---", ""]
        return newline.join(lines) + text
    block = found["yaml"]
    old = _load(block)
    new = _added(block, old, tags, newline)
    if new == block:
        return text
    before, after = found.span("yaml")
    _check(new, old, tags)
    return text[:before] + new + text[after:]


def front_matter(text: str) -> dict[str, Any]:
    """The fields at the head of a card; RainError if they are no mapping in YAML."""
    found = _BLOCK.match(text)
    return {} if found is None else _load(found["yaml"])


def with_fields(text: str, fields: Mapping[str, Any], *, instead: bool = False) -> str:
    """The card with those of the fields that its front matter has not; there must be one.

    A field without a value counts as missing. instead: other values take the place of those that
    are there, and the block is written anew; comments in it are lost.
    """
    found = _BLOCK.match(text)
    if found is None:
        return text
    block, old = found["yaml"], _load(found["yaml"])
    newline = "\r\n" if "\r\n" in text else "\n"
    before, after = found.span("yaml")
    if instead:
        return text[:before] + _dumped({**old, **fields}, newline) + text[after:]
    missing = {name: value for name, value in fields.items() if old.get(name) in (None, [], "")}
    if not missing:
        return text
    block = _without(block, old, missing.keys())
    return text[:before] + block + _dumped(missing, newline) + text[after:]


def _dumped(fields: Mapping[str, Any], newline: str) -> str:
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).replace("\n", newline)


def _without(block: str, old: Mapping[str, Any], names: AbstractSet[str]) -> str:
    """The block without those lines that name one of the fields and give no value."""
    for name in [one for one in names if one in old]:
        line = rf"^{re.escape(name)}:[ \t]*(?:\[\]|null|~|''|\"\")?[ \t]*\r?\n"
        block = re.sub(line, "", block, count=1, flags=re.MULTILINE)
    if names & _load(block).keys():
        raise RainError(
            f"its front matter has {', '.join(sorted(names & old.keys()))} in a form that cannot "
            "be filled in: remove that line"
        )
    return block


def _load(block: str) -> dict[str, Any]:
    try:
        content = load_yaml(block)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        text = shortened(str(error))
        raise RainError(f"its front matter is not valid YAML: {text}") from None
    if content is not None and not isinstance(content, dict):
        raise RainError("its front matter is not a mapping (key: value)")
    return content or {}


def _listed(tags: object) -> list[Any]:
    if tags is None:
        return []
    return tags if isinstance(tags, list) else [tags]


def _added(block: str, content: dict[str, Any], tags: Sequence[str], newline: str) -> str:
    missing = [tag for tag in tags if tag not in _listed(content.get("tags"))]
    if not missing:
        return block
    if "tags" not in content:
        return block + newline.join(["tags:", *(f"- {tag}" for tag in missing), ""])
    node = _tags_node(block)
    start, end = node.start_mark.index, node.end_mark.index
    if isinstance(node, yaml.SequenceNode) and node.value and not node.flow_style:
        last = node.value[-1].end_mark.index
        line_end = block.find("\n", last)
        place = len(block) if line_end < 0 else line_end + 1
        indent = " " * node.start_mark.column
        lines = "".join(f"{indent}- {tag}{newline}" for tag in missing)
        return block[:place] + lines + block[place:]
    everything = [*_listed(content["tags"]), *missing]
    flow = json.dumps(everything, ensure_ascii=False, default=str)
    space = "" if block[:start].endswith(" ") else " "
    return block[:start] + space + flow + block[end:]


def _tags_node(block: str) -> Any:
    root = yaml.compose(block, Loader=yaml.SafeLoader)
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    return next(value for key, value in pairs if key.value == "tags")


def _check(block: str, old: dict[str, Any], tags: Sequence[str]) -> None:
    """Parse the result and check that the added fields have the intended values."""
    had = _listed(old.get("tags"))
    wanted = [*had, *(tag for tag in tags if tag not in had)]
    try:
        new: object = load_yaml(block)
    except (yaml.YAMLError, ValueError):
        new = None
    if new != {**old, "tags": wanted}:
        raise RainError("its front matter has `tags` in a form that cannot be added to: use a list")
