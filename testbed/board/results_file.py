"""The cache: one JSON per trio, one entry per merge and list of prompts, saved after each."""

import json
import os
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class Results:
    """Entries by method, strength and list of prompts; those of another trio are dropped."""

    def __init__(self, path: Path, trio: str, digest: str) -> None:
        self.path = path
        self.data: dict[str, Any] = {"trio": trio, "digest": digest}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.get("digest") == digest:
                self.data = found
        self.entries: dict[str, Entry] = self.data.setdefault("entries", {})
        # By model or method with its strength: alignment and leakage of each layer.
        self.attention: dict[str, Entry] = self.data.setdefault("attention", {})
        self.calibrations: dict[str, Entry] = self.data.setdefault("calibrations", {})

    @staticmethod
    def key(method: str, strength: float, split: str, limit: int | None) -> str:
        return f"{method} | {strength:g} | {split} | {limit or 'all'}"

    def get(self, method: str, strength: float, split: str, limit: int | None) -> Entry | None:
        return self.entries.get(self.key(method, strength, split, limit))

    def put(
        self, entry: Entry, method: str, strength: float, split: str, limit: int | None
    ) -> None:
        """Keep one entry, on disk too."""
        kept = dict(entry) if split == "test" else {k: v for k, v in entry.items() if k != "bits"}
        self.entries[self.key(method, strength, split, limit)] = _rounded(kept)
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        parts = [f"{json.dumps(key)}: {_lines(self.data[key])}" for key in sorted(self.data)]
        text = "{\n" + ",\n".join(parts) + "\n}"
        part = self.path.with_suffix(".part")
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, self.path)


def kept(path: Path) -> Results:
    """What a file holds, whatever trio it is of."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return Results(path, found["trio"], found["digest"])


def _lines(value: Any) -> str:
    """JSON with one line per entry: short, and differences stay readable."""
    if not isinstance(value, dict):
        return json.dumps(value)
    items = [
        f" {json.dumps(key)}: {json.dumps(value[key], sort_keys=True)}" for key in sorted(value)
    ]
    return "{\n" + ",\n".join(items) + "\n}"


def _rounded(value: Any) -> Any:
    """Four significant digits are more than the intervals are worth."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
