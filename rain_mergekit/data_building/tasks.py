"""What a model is asked, and what it answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; None leaves a value to the model's own settings."""

    max_new_tokens: int
    temperature: float | None
    top_p: float | None
    seed: int


@dataclass(frozen=True)
class Task:
    """One answer to one prompt; attempts count from 0."""

    prompt: str
    attempt: int = 0

    @property
    def key(self) -> str:
        """A name that is the same in every run: 32 hexadecimal digits."""
        return hashlib.sha256(f"{self.attempt}\0{self.prompt}".encode()).hexdigest()[:32]

    def seed(self, base: int) -> int:
        """The task's own seed, below 2^31, independent of other tasks and their order."""
        return int(hashlib.sha256(f"{base}\0{self.key}".encode()).hexdigest()[:8], 16) >> 1


@dataclass(frozen=True)
class Written:
    """What a model wrote; `reasoning` is given where a server has taken it out of the text.

    `finished`: the model ended its turn within the token limit. `tokens`: how many it generated,
    None where nobody has said so.
    """

    text: str
    reasoning: str | None
    finished: bool
    tokens: int | None = None


class Writer(Protocol):
    """A model that answers, wherever it runs."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What must be equal for answers to be mixed in one file."""

    def write(
        self, tasks: Sequence[Task], is_done: Callable[[Task], bool]
    ) -> Iterator[list[tuple[Task, Written]]]:
        """Answers to the tasks that are not done, some at a time, in any order."""
