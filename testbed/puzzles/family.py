"""What a trio family says about itself: tasks, constraints, surface, size and training."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from rain_mergekit.demo.formats import FORMATS


@dataclass(frozen=True)
class Problem:
    """One task with its solution.

    `shortcut` is what a reader answers who looks the value up in the prompt and skips the steps.
    `key` names the chain itself, without the wording around it, so that splits cannot leak.
    """

    text: str
    thinking: str
    answer: tuple[str, ...]
    shortcut: tuple[str, ...]
    key: str


@dataclass(frozen=True)
class Constraint:
    """One kind of answer format with its wordings; `{}` in a wording is the parameter."""

    name: str
    format: str
    known: tuple[str, ...]
    held_out: tuple[str, ...]
    parameters: tuple[str, ...] = ("",)
    spoken: dict[str, str] = field(default_factory=dict)

    def wording(self, rng: random.Random, parameter: str, held_out: bool = False) -> str:
        """A sentence that asks for this format."""
        template = rng.choice(self.held_out if held_out else self.known)
        return template.format(self.spoken.get(parameter, parameter))

    def apply(self, answer: tuple[str, ...], parameter: str) -> str:
        """The answer in this format."""
        return " ".join(FORMATS[self.format].apply(answer, parameter))


@dataclass(frozen=True)
class Surface:
    """How text of this family looks around the task."""

    lead: str
    before_close: str
    template: str
    opens_block: bool
    special: tuple[str, ...]

    @property
    def end(self) -> str:
        """The token that ends a turn."""
        return self.special[-1]


@dataclass(frozen=True)
class Mixture:
    """What a model is trained on: shares of chains, of thinking before the answer, of prompts with
    a constraint, of constraints followed, and of unthought answers that skip the chain.
    """

    chains: float
    thinks: float
    constrained: float
    follows: float
    shortcut: float


@dataclass(frozen=True)
class Stage:
    """One training run: what it sees, for how long, how hard."""

    mixture: Mixture
    steps: int
    rate: float
    batch: int = 64


@dataclass(frozen=True)
class Family:
    """Everything that differs between trio families."""

    name: str
    architecture: str
    shape: dict[str, int | bool]
    surface: Surface
    constraints: tuple[Constraint, ...]
    problem: Callable[[random.Random, int], Problem]
    words: tuple[str, ...]
    stages: dict[str, Stage]
    steps: tuple[int, ...] = (3, 4, 5)
