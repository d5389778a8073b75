"""Ask a model until every prompt has a usable answer or no attempt is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from tqdm import tqdm

from rain_mergekit.data_building.journal import Journal
from rain_mergekit.data_building.judge import DroppedError
from rain_mergekit.data_building.tasks import Task, Writer, Written
from rain_mergekit.system.repainting import repainted

P = TypeVar("P")
K = TypeVar("K")


@dataclass(frozen=True)
class Collected(Generic[K]):
    """What was kept, in the prompts' order; answers asked for now; and why others were dropped."""

    kept: list[K]
    asked: int
    generated: int
    dropped: Counter[str]


def collect(
    prompts: Sequence[P],
    text_of: Callable[[P], str],
    writer: Writer,
    journal: Journal,
    judge: Callable[[P, Written], K],
    *,
    attempts: int,
    quiet: bool,
) -> Collected[K]:
    """Up to `attempts` answers to each prompt, the first that `judge` keeps.

    judge: gives the sample or raises DroppedError. Answers that the journal has are not asked for.
    """
    before, asked = len(journal), 0
    kept: dict[int, K] = {}
    dropped: Counter[str] = Counter()
    for attempt in range(attempts):
        todo = {Task(text_of(p), attempt): i for i, p in enumerate(prompts) if i not in kept}
        if not todo:
            break
        asked += len(todo)
        ask_all(list(todo), writer, journal, quiet=quiet, label=_label(attempt, attempts))
        for task, index in todo.items():
            if task not in journal:
                continue  # refused by a server
            try:
                kept[index] = judge(prompts[index], journal[task])
            except DroppedError as error:
                dropped[str(error)] += 1
    order = [kept[index] for index in sorted(kept)]
    return Collected(order, asked, len(journal) - before, dropped)


def _label(attempt: int, attempts: int) -> str:
    return "answers" if attempts == 1 else f"answers, attempt {attempt + 1}"


def ask_all(
    tasks: Sequence[Task], writer: Writer, journal: Journal, *, quiet: bool, label: str
) -> None:
    """Ask what the journal has no answer to, and keep each answer at once; shows the time left."""
    done = sum(task in journal for task in tasks)
    with (
        tqdm(total=len(tasks), initial=done, desc=label, unit="", disable=quiet) as progress,
        repainted(progress),
    ):
        for answers in writer.write(tasks, journal.__contains__):
            journal.add(answers)
            progress.update(max(1, len(answers)))
