"""Files of answers: what a model wrote to each prompt, with the prompt, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from rain_mergekit.data_building.collect import ask_all
from rain_mergekit.data_building.journal import Journal
from rain_mergekit.data_building.judge import known_format
from rain_mergekit.data_building.tasks import Sampling, Task, Writer, Written
from rain_mergekit.errors import RainError
from rain_mergekit.evaluation.answer_measures import Measured, measure, reading_of
from rain_mergekit.instructions.hub_files import PREFIX
from rain_mergekit.instructions.hub_prompts import read_hub_prompts
from rain_mergekit.instructions.prompts import Asked, parse_prompt, read_prompts
from rain_mergekit.instructions.rules import check_rules
from rain_mergekit.system.evenly_spaced import evenly_spaced
from rain_mergekit.system.json_fields import JsonFields
from rain_mergekit.system.json_samples import JsonObject, read_text
from rain_mergekit.text.marker_detection import text_markers
from rain_mergekit.text.markers import Markers

MADE_BY = "mergekit-rain ask"


@dataclass(frozen=True)
class Answer:
    """One of a model's answers to a prompt, numbered from 0, and what was measured of it."""

    asked: Asked
    sample: int
    written: Written
    measured: Measured


@dataclass(frozen=True)
class AnswerSet:
    """All answers of one model; `name` is what tables call it, `head` how they were made."""

    name: str
    path: str
    head: Mapping[str, Any]
    answers: tuple[Answer, ...]

    @cached_property
    def by_prompt(self) -> dict[str, list[Answer]]:
        """The answers to each prompt; prompts in the order of their text."""
        found: dict[str, list[Answer]] = {}
        for answer in self.answers:
            found.setdefault(answer.asked.text, []).append(answer)
        return found


def chosen_prompts(
    path: str | None, count: int | None, cache_dir: str | None = None
) -> list[Asked]:
    """So many prompts of the file, evenly spaced; None: the package's prompts, all of them.

    path: a file, or `hub:OWNER/NAME` for a data set of the hub, whose downloads are kept in
    `cache_dir`. RainError if it cannot be read, or instructions in it cannot be checked here.
    """
    if path is None:
        found = own_prompts()
    elif path.startswith(PREFIX):
        found = read_hub_prompts(path, cache_dir)
    else:
        found = read_prompts(path)
    chosen = list(evenly_spaced(found, count or len(found)))
    check_rules(chosen)
    return chosen


def own_prompts() -> list[Asked]:
    """The prompts that come with the package."""
    with resources.as_file(resources.files(__package__) / "prompts.jsonl") as path:
        return read_prompts(path)


def ask(
    writer: Writer,
    asked: Sequence[Asked],
    path: str,
    made_with: Mapping[str, Any],
    *,
    samples: int,
    quiet: bool,
) -> int:
    """Let a model answer each prompt `samples` times into the file; how many are new.

    Answers that the file has are not asked for again. RainError if the file was made with
    something else, or the model cannot be asked; what it has answered is kept.
    """
    by_text = {prompt.text: prompt for prompt in asked}
    tasks = [Task(text, number) for number in range(samples) for text in by_text]

    def describe(task: Task) -> dict[str, Any]:
        return {"sample": task.attempt, **by_text[task.prompt].record()}

    with Journal(path, made_with, made_by=MADE_BY, suffix="", describe=describe) as journal:
        before = len(journal)
        ask_all(tasks, writer, journal, quiet=quiet, label="answers")
        return len(journal) - before


def header(
    writer: Writer, sampling: Sampling, markers: Markers | None, template: Mapping[str, Any]
) -> dict[str, Any]:
    """How the answers were made; markers None: the model's, or found in a server's answers."""
    markers, opens = known_format(writer, markers, template)
    return {
        "version": 1,
        **writer.identity,
        **asdict(sampling),
        "chat_template_kwargs": dict(template),
        "markers": None if markers is None else [list(pair) for pair in markers.pairs],
        "opened_by_template": opens,
    }


def read_answers(path: str, name: str | None = None) -> AnswerSet:
    """Read and measure; a line that a crash cut short is left out.

    RainError if the file was not written by `mergekit-rain ask`, or holds no answers.
    """
    text = read_text(path)
    lines = text[: text.rfind("\n") + 1].split("\n")[:-1]
    head = _object(path, 1, lines[0]) if lines else JsonObject([])
    if head.get("made_by") != MADE_BY:
        raise RainError(f"{path}: is not a file of answers; `{MADE_BY}` writes them")
    found = (_row(path, number, line) for number, line in enumerate(lines[1:], start=2))
    rows = sorted(found, key=lambda row: (row[0].text, row[1]))  # answers come in any order
    if not rows:
        raise RainError(f"{path}: holds no answers yet; run `{MADE_BY}` again")
    return AnswerSet(name or Path(path).stem, path, head, tuple(_measured(head, rows)))


def _measured(
    head: Mapping[str, Any], rows: Sequence[tuple[Asked, int, Written]]
) -> Iterator[Answer]:
    written = [row[2] for row in rows]
    how = reading_of(written, _markers(head, written), _opens(head))
    for asked, sample, one in rows:
        yield Answer(asked, sample, one, measure(asked, one, how))


def _markers(head: Mapping[str, Any], written: Sequence[Written]) -> Markers:
    pairs = head.get("markers")
    if isinstance(pairs, list) and all(isinstance(pair, list) for pair in pairs):
        return Markers.of([(str(first), str(last)) for first, last in pairs])
    return text_markers(*(one.text for one in written))


def _opens(head: Mapping[str, Any]) -> bool | None:
    found = head.get("opened_by_template")
    return found if isinstance(found, bool) else None


def _row(path: str, number: int, line: str) -> tuple[Asked, int, Written]:
    value = _object(path, number, line)
    fields = JsonFields(f"{path}:{number}", value)
    sample, tokens = value.get("sample", 0), value.get("tokens")
    text, reasoning, finished = (value.get(name) for name in ("text", "reasoning", "finished"))
    good = isinstance(text, str) and isinstance(finished, bool) and isinstance(sample, int)
    if not good or not isinstance(reasoning, str | None) or not isinstance(tokens, int | None):
        raise RainError(f"{path}:{number}: is no answer; remove the line, and ask again")
    return (
        parse_prompt(fields),
        int(str(sample)),
        Written(str(text), reasoning, finished is True, tokens),
    )


def _object(path: str, number: int, line: str) -> JsonObject:
    try:
        value = json.loads(line, object_pairs_hook=JsonObject)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, JsonObject):
        raise RainError(f"{path}:{number}: is no answer; remove the line, and ask again")
    return value
