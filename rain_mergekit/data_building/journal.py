"""A log of all answers, written at once, so that no answer is generated twice."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from rain_mergekit.data_building.tasks import Task, Written
from rain_mergekit.errors import RainError

SUFFIX = ".answers.jsonl"
_MADE_BY = "mergekit-rain data"


class Journal:
    """A file of JSON lines, by default one beside the set; one process at a time.

    The first line says what the answers were made with, each other one holds one answer. A line
    that a crash cut short is dropped, and that answer is asked for again. describe: what a line
    says of its task beside the key.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        made_with: Mapping[str, Any],
        *,
        made_by: str = _MADE_BY,
        suffix: str = SUFFIX,
        describe: Callable[[Task], Mapping[str, Any]] = lambda _task: {},
    ) -> None:
        self.path = Path(os.fspath(output) + suffix)
        self._made_by, self._describe = made_by, describe
        self._head = {"made_by": made_by, **made_with}
        self._answers: dict[str, Written] = {}
        self._file = -1

    def __enter__(self) -> Journal:  # noqa: PYI034 - Self needs Python 3.11
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            self._close()
            raise RainError(
                f"{self.path}: another run is writing there; wait for it to end, or name another "
                "output with -o"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            self._close()
            raise RainError(f"{self.path}: cannot be used to keep the answers: {error}") from None
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def __len__(self) -> int:
        return len(self._answers)

    def __contains__(self, task: Task) -> bool:
        return task.key in self._answers

    def __getitem__(self, task: Task) -> Written:
        return self._answers[task.key]

    def add(self, answers: Iterable[tuple[Task, Written]]) -> None:
        """Keep answers; they are on the disk when this returns. RainError if they cannot be."""
        lines = ""
        for task, written in answers:
            self._answers[task.key] = written
            content = {"key": task.key, **self._describe(task), **asdict(written)}
            lines += json.dumps(content, ensure_ascii=True) + "\n"
        self._append(lines)

    def _append(self, text: str) -> None:
        try:
            data = text.encode()
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError as error:
            raise RainError(
                f"{self.path}: cannot be used to keep the answers: {error.strerror}"
            ) from None

    def _read(self) -> None:
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        lines = whole.decode().splitlines()
        if lines:
            self._compare(_load(lines[0]))
        if len(whole) < len(text):
            os.truncate(self._file, len(whole))
        if not lines:
            self._append(json.dumps(self._head) + "\n")
        for line in lines[1:]:
            found = _load(line)
            try:
                answer = Written(
                    found["text"], found["reasoning"], found["finished"], found.get("tokens")
                )
                self._answers[found["key"]] = answer
            except KeyError:
                continue  # an incomplete line: the answer is asked for again

    def _compare(self, head: Mapping[str, Any]) -> None:
        if head.get("made_by") != self._made_by:
            raise RainError(
                f"{self.path}: exists and holds no answers of `{self._made_by}`; it will not be "
                "overwritten: name another output with -o"
            )
        names = {**self._head, **head}
        differing = [name for name in names if head.get(name) != self._head.get(name)]
        if differing:
            raise RainError(
                f"{self.path}: holds answers that were made with another {', '.join(differing)}; "
                "remove it to begin anew, or name another output with -o"
            )

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _load(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
