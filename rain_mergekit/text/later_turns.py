"""Samples as the second turn of a chat: the prompt and the answer of another go before them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TypeVar

from rain_mergekit.text.markers import Markers
from rain_mergekit.text.samples import InstructionSample, ReasoningSample
from rain_mergekit.text.thinking_blocks import split_thinking

S = TypeVar("S", ReasoningSample, InstructionSample)


@dataclass(frozen=True)
class LaterTurns:
    """Which samples get a turn before them, and the turns that there are.

    share: of all prompts, told by a digest of their text, so that a prompt of both sets is treated
    alike in both. turns: (prompt, answer), each prompt once; an answer comes without its thinking,
    as most chat templates show earlier turns.
    """

    share: float
    turns: Sequence[tuple[str, str]]

    def of(self, sample: S) -> S:
        """The sample with a turn in its `before`, or as it is.

        One that has earlier turns or tool results of its own stays as it is.
        """
        digest = sha256(sample.prompt.encode("utf-8", "surrogatepass")).digest()
        lot, at = (int.from_bytes(part, "little") for part in (digest[:4], digest[4:8]))
        if lot >= self.share * 2**32 or not _is_first(sample):
            return sample
        for prompt, answer in (self.turns[(at + i) % len(self.turns)] for i in range(2)):
            if prompt != sample.prompt:
                said = {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}
                return replace(sample, before=said)
        return sample


def turns_of(
    samples: Iterable[ReasoningSample | InstructionSample],
    markers: Markers,
    special: Collection[str] = (),
) -> list[tuple[str, str]]:
    """(prompt, answer) of each sample that asks once and has an answer, in order.

    special: the tokenizer's special tokens. Those that end an output are left out, as the chat
    template writes them, too; an answer with others, or with markers, is no turn to show.
    """
    found = {one.prompt: _answer(one, markers, special) for one in samples if _is_first(one)}
    unfit = (*special, *markers.opens, *markers.closes())
    return [
        (prompt, answer)
        for prompt, answer in found.items()
        if prompt.strip() and answer and not any(word in answer for word in unfit)
    ]


def _is_first(sample: ReasoningSample | InstructionSample) -> bool:
    """Whether one question of the user's is all that the sample's request has."""
    *system, last = sample.conversation
    roles = {message["role"] for message in system}
    return last["role"] == "user" and roles <= {"system", "developer"} and not sample.tools


def _answer(
    sample: ReasoningSample | InstructionSample, markers: Markers, special: Collection[str]
) -> str:
    """What it says after its thinking, without surrounding space; "" where there is nothing.

    A block that the chat template opened ends in an output that only closes it.
    """
    if sample.output is None:
        return (sample.response or "").strip()
    said = split_thinking(sample.output, markers)
    if not said.opened and said.closed:
        said = split_thinking(sample.output, markers, opened_by_template=True)
    answer = said.response
    while ends := [token for token in special if token and answer.endswith(token)]:
        answer = answer.removesuffix(max(ends, key=len)).rstrip()
    return answer
