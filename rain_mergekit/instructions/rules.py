"""Whether an answer follows the instructions of its prompt: IFEval's rules, and a few of our own.

Our own rules cover what IFEval lacks: exact counts, given headings, keys and columns.
"""

from __future__ import annotations

from collections.abc import Sequence

from rain_mergekit.errors import RainError
from rain_mergekit.instructions import ifeval, own
from rain_mergekit.instructions.prompts import Asked, Instruction


def check_rules(prompts: Sequence[Asked]) -> None:
    """RainError now rather than after generating, if a rule cannot be applied."""
    for prompt in prompts:
        follows(prompt, "Some text.")


def follows(asked: Asked, response: str) -> list[bool]:
    """For each of the prompt's instructions, whether the response follows it, strictly.

    An empty response follows none. Raises RainError for a rule that does not exist, arguments that
    it does not take or misses, and where `if-verifiable`, which has IFEval's rules, is missing.
    """
    return [
        _follows(asked.source, instruction, response) and bool(response.strip())
        for instruction in asked.instructions
    ]


def _follows(source: str, instruction: Instruction, response: str) -> bool:
    kind, kwargs = instruction.kind, instruction.kwargs
    where = f"{source}: {instruction.label}"
    if kind in own.RULES:
        return own.RULES[kind](own.arguments(where, kind, kwargs), response)
    rules = ifeval.load(source)
    if kind not in rules:
        known = ", ".join([*sorted(rules), *own.RULES])
        raise RainError(f"{source}: there is no rule {kind!r} (known: {known})")
    return ifeval.follows(rules[kind](kind), where, kwargs, response)
