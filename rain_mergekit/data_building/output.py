"""The finished set: JSON lines, written as a whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rain_mergekit.errors import RainError
from rain_mergekit.system.atomic_file import replacing


def write_samples(path: str, samples: Iterable[Mapping[str, Any]]) -> None:
    """One sample a line, UTF-8. RainError if it cannot be written."""
    with replacing(path) as out:
        for sample in samples:
            out.write(json.dumps(sample, ensure_ascii=False).encode("utf-8", "replace") + b"\n")


def refuse_overwriting(output: str, journal: str) -> None:
    """RainError if the output exists and was not made by the same command."""
    if Path(output).exists() and not Path(journal).exists():
        raise RainError(
            f"{output}: exists and was not made by `mergekit-rain data`; it will not be "
            "overwritten: name another output with -o"
        )
