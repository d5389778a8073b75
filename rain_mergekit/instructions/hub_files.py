"""Which files of a data set's repository hold a split: as its card says, else by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import yaml

from rain_mergekit.errors import RainError
from rain_mergekit.system.untrusted_input import load_yaml

PREFIX = "hub:"
FORM = "hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT[:COLUMN]]"
# What can be read, and what is taken where a split is there in several formats.
ENDS = (".jsonl", ".json", ".parquet")
SPLITS = ("test", "validation", "train")  # the first of them that is there, where none is named
_WORDS = {
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("train", "training"), "train"),
}
_NUMBERED = re.compile(r"([\w.]+)-\d{5}-of-\d{5}")
_ABOUT = ("dataset_info.json", "dataset_infos.json", "config.json", "state.json")
_HEAD = re.compile(r"\A\ufeff?---[ \t]*\r?\n((?:.*\n)*?)---[ \t]*(?:\r?\n|\Z)")


@dataclass(frozen=True)
class HubSet:
    """A data set's name on the hub, and what of it is meant; None leaves that open."""

    name: str
    config: str | None = None
    revision: str | None = None
    split: str | None = None
    column: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubSet:
        """From `hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT[:COLUMN]]`; RainError otherwise."""
        place, _, rest = text.removeprefix(PREFIX).partition(":")
        split, _, column = rest.partition(":")
        path, _, revision = place.partition("@")
        parts = path.split("/", 2)
        if len(parts) < 2 or not all(parts):
            raise RainError(f"{text}: is not a data set of the hub; expected {FORM}")
        config = parts[2] if len(parts) > 2 else None
        name = "/".join(parts[:2])
        return cls(name, config, revision or None, split or None, column or None)

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}"


def chosen_files(files: Sequence[str], card: str, wanted: HubSet) -> list[str]:
    """The files of that configuration and split, in order.

    files: paths in the repository. card: the text of its README.md, "" where there is none.
    Raises RainError where there is no such configuration or split, or several and none is named.
    """
    usable = [f for f in sorted(files) if f.endswith(ENDS) and f.rpartition("/")[2] not in _ABOUT]
    declared = [one for one in _configurations(card) if one.get("config_name")]
    splits = _declared(usable, declared, wanted) if declared else {}
    splits = splits or _named(usable, None if declared else wanted.config)
    if not splits:
        what = f" in {wanted.config}" if wanted.config else ""
        raise RainError(f"{wanted}: has no file{what} that is read here ({', '.join(ENDS)})")
    found = splits[_split(wanted, splits)]
    end = next(end for end in ENDS if any(file.endswith(end) for file in found))
    return [file for file in found if file.endswith(end)]


def _split(wanted: HubSet, splits: Mapping[str, Sequence[str]]) -> str:
    if wanted.split is not None:
        if wanted.split in splits:
            return wanted.split
        raise RainError(f"{wanted}: has no split {wanted.split!r}, but {_listed(splits)}")
    known = next((name for name in SPLITS if name in splits), None)
    if known is None and len(splits) > 1:
        raise RainError(f"{wanted}: has several splits ({_listed(splits)}); name one: {FORM}")
    return known or next(iter(splits))


def _configurations(card: str) -> list[Mapping[str, Any]]:
    """`configs` of the card's front matter; none where it cannot be read."""
    head = _HEAD.match(card)
    try:
        fields = load_yaml(head[1]) if head else None
    except (ValueError, yaml.YAMLError, RecursionError):
        return []
    found = fields.get("configs") if isinstance(fields, dict) else None
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _declared(
    files: Sequence[str], configs: Sequence[Mapping[str, Any]], wanted: HubSet
) -> dict[str, list[str]]:
    """By split, what the card lists for the configuration; nothing if it lists no files."""
    by_name = {str(one["config_name"]): one for one in configs}
    if wanted.config is not None:
        one = by_name.get(wanted.config)
        if one is None:
            raise RainError(
                f"{wanted}: has no configuration {wanted.config!r}, but {_listed(by_name)}"
            )
    else:
        first = next((c for n, c in by_name.items() if c.get("default") or n == "default"), None)
        if first is None and len(by_name) > 1:
            raise RainError(
                f"{wanted}: has several configurations ({_listed(by_name)}); name one: {FORM}"
            )
        one = first or next(iter(by_name.values()))
    folder = str(one.get("data_dir") or "").strip("./")
    inside = [file for file in files if not folder or file.startswith(f"{folder}/")]
    listed = one.get("data_files")
    if listed is None:
        return _named(inside, None)
    found = {
        split: [file for file in inside if _matches(file, folder, patterns)]
        for split, patterns in _patterns(listed).items()
    }
    return {split: matched for split, matched in found.items() if matched}


def _patterns(listed: object) -> dict[str, list[str]]:
    """`data_files` in each of its forms: patterns by split."""
    if isinstance(listed, dict):
        return {str(split): _texts(paths) for split, paths in listed.items()}
    rows: list[Any] = listed if isinstance(listed, list) else [listed]
    if all(isinstance(row, dict) for row in rows):
        return {str(row.get("split", "train")): _texts(row.get("path")) for row in rows}
    return {"train": _texts(rows)}


def _texts(value: object) -> list[str]:
    items: Iterable[object] = value if isinstance(value, list) else [value]
    return [item.removeprefix("./") for item in items if isinstance(item, str)]


def _matches(file: str, folder: str, patterns: Iterable[str]) -> bool:
    path = file.removeprefix(f"{folder}/") if folder else file
    forms = {form for one in patterns for form in (one, one.replace("**/", ""))}
    return any(fnmatchcase(path, form) or fnmatchcase(file, form) for form in forms)


def _named(files: Sequence[str], folder: str | None) -> dict[str, list[str]]:
    """By split, as the names have it; all of them are `train` where no name says anything."""
    inside = [file for file in files if folder is None or file.startswith(f"{folder}/")]
    found: dict[str, list[str]] = {}
    for file in inside:
        split = _split_of(file if folder is None else file.removeprefix(f"{folder}/"))
        if split is not None:
            found.setdefault(split, []).append(file)
    return found or ({"train": inside} if inside else {})


def _split_of(path: str) -> str | None:
    """The split that a path names: `NAME-00000-of-00002`, or the last word that is one."""
    numbered = _NUMBERED.match(path.rpartition("/")[2])
    if numbered is not None:
        return numbered[1]
    words = [_WORDS.get(word) for word in re.split(r"[ ._/0-9-]+", path.lower())]
    return next(filter(None, reversed(words)), None)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
