"""Whether an answer follows the instructions of its prompt: public rules, and a few of our own.

Public ones are IFEval's and IFBench's. Our own cover what they lack: exact counts, given headings,
keys and columns.
"""

from __future__ import annotations

from collections.abc import Sequence

from rain_mergekit.errors import RainError
from rain_mergekit.instructions import own, public_rules
from rain_mergekit.instructions.prompts import Asked, Instruction


def check_rules(prompts: Sequence[Asked]) -> None:
    """RainError now rather than after generating, if a rule cannot be applied."""
    for prompt in prompts:
        follows(prompt, "Some text.", "Some text.")


def follows(asked: Asked, response: str, thinking: str = "") -> list[bool]:
    """For each of the prompt's instructions, whether the answer follows it, strictly.

    The response counts, or for an instruction about the thinking the text inside the block. An
    empty text follows none. Raises RainError for a rule that does not exist, arguments that it does
    not take or misses, and where `if-verifiable`, which has the public rules, is missing.
    """
    return [
        _follows(asked.source, instruction, thinking if instruction.binds_thinking else response)
        for instruction in asked.instructions
    ]


def _follows(source: str, instruction: Instruction, text: str) -> bool:
    kind, kwargs = instruction.rule, instruction.kwargs
    where = f"{source}: {instruction.label}"
    if kind in own.RULES:
        followed = own.RULES[kind](own.arguments(where, kind, kwargs), text)
    elif (rule := public_rules.find(source, kind)) is not None:
        followed = public_rules.follows(rule, where, kwargs, text)
    else:
        public = sorted([*public_rules.ifeval(source), *public_rules.ifbench(source)])
        known = ", ".join([*public, *own.RULES])
        raise RainError(f"{source}: there is no rule {kind!r} (known: {known})")
    return followed and bool(text.strip())
