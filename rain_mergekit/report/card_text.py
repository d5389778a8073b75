"""Pieces of the text of a model card that do not depend on the merge method."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from rain_mergekit.calibration_file.summary import Data, FileSummary
from rain_mergekit.evaluation.verification_record import VerificationRecord
from rain_mergekit.report.public_names import public_name
from rain_mergekit.system.terminal_safe import clean
from rain_mergekit.system.wording import counted

_LONGEST = 200
USAGE = """\
```python
from transformers import pipeline

chat = pipeline("text-generation", model="NAME-OR-FOLDER-OF-THIS-MODEL", device_map="auto")
question = [{"role": "user", "content": "How many days are in two weeks? Answer in capitals."}]
print(chat(question, max_new_tokens=4096)[0]["generated_text"][-1]["content"])
```"""


def two_columns(rows: Iterable[tuple[str, str]]) -> str:
    """A Markdown table without a heading."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)])


def opening_rows(strength: Any, summary: FileSummary) -> Iterator[tuple[str, str]]:
    """The models by role and the strength, as rows of the table."""
    for role, reference in summary.listed.items():
        yield f"{role} model", model_link(reference)
    yield "strength λ", code(strength if isinstance(strength, str) else json.dumps(strength))


def data_rows(summary: FileSummary) -> Iterator[tuple[str, str]]:
    """The calibration sets, as rows of the table."""
    for name, data in summary.data.items():
        yield f"calibration, {name} data", data_set(data)


def measurement(found: VerificationRecord) -> Iterator[tuple[str, str]]:
    """What `verify --card` has measured, as rows of the table."""
    numbers = f"L_think {found.think:.3g}, in the thinking block {found.content:.3g}, elsewhere"
    verdict = f"the thinking format is {code(found.verdict)}"
    yield "divergence from the reasoning model", f"{numbers} {found.rest:.3g} nats; {verdict}"
    about = f"{counted(found.samples, 'sample')}, SHA-256 {code(found.sha256)}"
    yield "measured on", f"{code(found.data)}, {about}"


def model_link(reference: str) -> str:
    """A model by its public name, with a link where it is on the hub."""
    name = public_name(reference)
    if name.hub is None:
        return code(name.text)
    place = f"https://huggingface.co/{name.hub}"
    if name.revision is None:
        return f"[{name.hub}]({place})"
    return f"[{name.hub}]({place}/tree/{name.revision}), revision {code(name.revision)}"


def data_set(data: Data) -> str:
    """A calibration set: its name, the samples used, its digest."""
    # The name alone: the folders of whoever calibrated are of no use to a reader.
    name = re.split(r"[/\\]", data.path)[-1]
    used = "?" if data.used is None else data.used
    total = "?" if data.total is None else data.total
    later = f" ({data.later} later in a chat)" if data.later else ""
    digest = code(data.sha256 or "unknown")
    return f"{code(name)}, {used} of {total} samples{later}, SHA-256 {digest}"


def code(value: object) -> str:
    """A value as code on one line; nothing in it can end the code, the table or our part."""
    text = clean(" ".join(str(value).split()))[:_LONGEST]
    for char, shown in (("`", "'"), ("|", "/"), ("<", "‹"), (">", "›")):  # noqa: RUF001
        text = text.replace(char, shown)
    return f"`{text}`" if text else "`?`"
