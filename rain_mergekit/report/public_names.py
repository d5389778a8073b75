"""Models by the names under which others find them, in place of paths of this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mergekit.common import ModelReference

from rain_mergekit.config.merge_config import MergeRecipe
from rain_mergekit.errors import RainError
from rain_mergekit.report.front_matter import front_matter
from rain_mergekit.system.untrusted_input import read_regular

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CACHED = re.compile(
    r"(?:^|/)models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<commit>[\w.-]+)/?$"
)


@dataclass(frozen=True)
class PublicName:
    """text: what to call the model; hub: its name there, None for a model that is only here."""

    text: str
    hub: str | None = None
    revision: str | None = None


def public_name(reference: str) -> PublicName:
    """A hub name as it is, the model's name for a folder of the hub's cache, else the last part."""
    if "+" in reference:
        base, _, adapter = reference.partition("+")
        parts = public_name(base), public_name(adapter)
        return PublicName(" + ".join(part.text for part in parts))
    if found := _CACHED.search(reference):
        hub = f"{found['owner']}/{found['name']}"
        return PublicName(hub, hub, found["commit"])
    path, _, revision = reference.partition("@")
    named = _HUB_NAME.fullmatch(path) and re.fullmatch(r"[\w./-]*", revision)
    if named and not os.path.exists(path):
        return PublicName(path, path, revision or None)
    local = reference.startswith(("/", "~", ".")) or os.path.exists(reference)
    return PublicName(Path(reference).name or reference if local else reference)


def without_local_paths(text: str, config: MergeRecipe) -> str:
    """The text with public names in place of the paths of this machine that a merge has in it."""
    for path, name in sorted(_replaced(config).items(), key=lambda item: -len(item[0])):
        text = text.replace(path, name)
    return text


def _replaced(config: MergeRecipe) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for reference in config.models.values():
        for part in (reference.model, reference.lora):
            if part is not None and os.path.isabs(part.path):
                found[part.path] = public_name(part.path).text
    section = config.content.get("rain")  # absent after mergekit-multi
    named = section if isinstance(section, Mapping) else {}
    for path in (str(config.calibration), *map(named.get, ("reasoning_data", "instruction_data"))):
        if isinstance(path, str) and os.path.isabs(path):
            found[path] = Path(path).name
    return found


def model_tree(models: Mapping[str, ModelReference], main: ModelReference) -> dict[str, object]:
    """What the hub needs to show from which models this one was made, and under which license.

    main: the one whose license is taken over.
    """
    parts = [part for reference in models.values() for part in str(reference).split("+")]
    names = [public_name(part).hub for part in parts]  # of an adapter, and of the model below it
    bases = list(dict.fromkeys(name for name in names if name is not None))
    found: dict[str, object] = {}
    if bases:
        found = {"base_model": bases, "base_model_relation": "merge"}
    return {**found, "pipeline_tag": "text-generation", **_of_card(main)}


def _of_card(model: ModelReference) -> dict[str, object]:
    """The model's license and kind of use, where its card is here and names them."""
    card = Path(model.model.path, "README.md")
    try:
        fields = front_matter(read_regular(card).decode("utf-8"))
    except (OSError, ValueError, RainError):
        return {}
    names = ("license", "license_name", "license_link", "pipeline_tag")
    return {name: fields[name] for name in names if isinstance(fields.get(name), str)}
