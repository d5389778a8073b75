"""Prompts with their answers, drawn from a family for a split and dressed for a model's role."""

import random
from dataclasses import dataclass

from testbed.puzzles.family import Constraint, Family, Mixture, Problem, Surface
from testbed.puzzles.splits import split_of


@dataclass(frozen=True)
class Task:
    """A prompt as a model sees it, and all that is known about it."""

    prompt: str
    problem: Problem
    constraint: Constraint | None = None
    parameter: str = ""
    wording: str = ""
    held_out: bool = False

    def response(self, answer: tuple[str, ...] | None = None, follows: bool = True) -> str:
        """The answer's words, the right ones by default, in the asked format if it follows."""
        words = answer or self.problem.answer
        if self.constraint is None or not follows:
            return " ".join(words)
        return self.constraint.apply(words, self.parameter)


def draw_problem(family: Family, rng: random.Random, seed: int, split: str, steps: int) -> Problem:
    """A problem whose chain belongs to the split; look-ups have no chain and belong to all."""
    while True:
        problem = family.problem(rng, steps)
        if steps == 0 or split_of(problem.key, seed) == split:
            return problem


def dress(
    problem: Problem, constraint: Constraint | None, rng: random.Random, held_out: bool = False
) -> Task:
    """Ask for a format in one of its wordings, before or after the task."""
    if constraint is None:
        return Task(problem.text, problem)
    parameter = rng.choice(constraint.parameters)
    wording = constraint.wording(rng, parameter, held_out)
    parts = [wording, problem.text] if rng.random() < 0.5 else [problem.text, wording]
    return Task(" ".join(parts), problem, constraint, parameter, wording, held_out)


def completion(surface: Surface, thinking: str | None, response: str) -> str:
    """What a model says after the generation prompt, the open marker included."""
    answer = f"{surface.lead} {response}"
    if thinking is None:
        return answer
    return f"<think>\n{thinking}{surface.before_close}</think>\n\n{answer}"


def training_pair(
    family: Family, mixture: Mixture, rng: random.Random, seed: int
) -> tuple[str, str]:
    """One prompt and completion of a training mixture; only known wordings, only train chains."""
    steps = rng.choice((1, 2, *family.steps)) if rng.random() < mixture.chains else 0
    problem = draw_problem(family, rng, seed, "train", steps)
    constrained = rng.random() < mixture.constrained
    task = dress(problem, rng.choice(family.constraints) if constrained else None, rng)
    thinks = rng.random() < mixture.thinks
    hurries = not thinks and rng.random() < mixture.shortcut
    response = task.response(problem.shortcut if hurries else None, rng.random() < mixture.follows)
    return task.prompt, completion(family.surface, problem.thinking if thinks else None, response)


def held_tasks(
    family: Family, rng: random.Random, seed: int, split: str, counts: tuple[int, int, int]
) -> list[Task]:
    """Distinct chains of a split: so many in known wordings, in held-out wordings, and plain."""
    known, held_out, plain = counts
    kinds = family.constraints
    wanted = [(kinds[i % len(kinds)], False) for i in range(known)]
    wanted += [(kinds[i % len(kinds)], True) for i in range(held_out)]
    tasks, seen = [], set[str]()
    for constraint, held in [*wanted, *[(None, False)] * plain]:
        problem = draw_problem(family, rng, seed, split, rng.choice(family.steps))
        while problem.key in seen:
            problem = draw_problem(family, rng, seed, split, rng.choice(family.steps))
        seen.add(problem.key)
        tasks.append(dress(problem, constraint, rng, held))
    return tasks
