"""Measures of one answer: thinking block, length, loops, language, correctness."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rain_mergekit.data_building.tasks import Written
from rain_mergekit.instructions.prompts import Asked
from rain_mergekit.instructions.rules import follows
from rain_mergekit.text.markers import Markers, first
from rain_mergekit.text.repetition import Repetition, repetition
from rain_mergekit.text.thinking_blocks import Thought, split_thinking
from rain_mergekit.text.writing_systems import LEAST_SHARE, foreign_share

# An answer that was cut off loops too if it says so little new: loops that count up, or vary a
# word, never repeat a span exactly.
_STALE_NGRAMS = 0.5
_OTHER_LANGUAGES = "language:response_language"


@dataclass(frozen=True)
class Measured:
    """What was measured of one answer to one prompt.

    Attributes:
        opened: whether there is a thinking block.
        closed: whether the block was closed.
        blocks: number of thinking blocks, closed or open.
        empty: whether nothing is in the block.
        finished: whether the model ended its turn within the token limit.
        thinking: tokens of the thinking. Where the text holds thinking and response, the tokens
            are divided by characters; where none were counted, words and signs take their place.
        answering: tokens of the response, counted in the same way.
        repetition: how much the answer repeats itself.
        foreign: largest share of letters in scripts that the prompt does not have.
        correct: whether the response is right; None where the prompt has no key.
        followed: of each instruction for the response; None where there are none.
        heeded: of each instruction for the thinking; None where there are none.
    """

    opened: bool
    closed: bool
    blocks: int
    empty: bool
    finished: bool
    thinking: float
    answering: float
    repetition: Repetition
    foreign: float
    correct: bool | None
    followed: tuple[bool, ...] | None
    heeded: tuple[bool, ...] | None = None

    @property
    def tokens(self) -> float:
        """Tokens of thinking and response together."""
        return self.thinking + self.answering

    @property
    def whole(self) -> bool:
        """Exactly one thinking block, with something in it, that was closed."""
        return self.opened and self.closed and not self.empty and self.blocks == 1

    @property
    def looped(self) -> bool:
        """A span comes four times in a row or more, or a cut text mostly repeats itself."""
        stale = not self.finished and self.repetition.ngrams > _STALE_NGRAMS
        return self.repetition.loop is not None or stale

    @property
    def switched(self) -> bool:
        """Whether thinking or response leave the scripts of the prompt."""
        return self.foreign > LEAST_SHARE

    @property
    def obedient(self) -> bool | None:
        """Whether all instructions for the response are followed; None without any."""
        return None if self.followed is None else all(self.followed)

    @property
    def mindful(self) -> bool | None:
        """Whether the thinking follows all instructions for it; None without any."""
        return None if self.heeded is None else all(self.heeded)

    @property
    def both(self) -> bool | None:
        """Right, and all instructions followed; None unless the prompt has both."""
        if self.correct is None or self.obedient is None:
            return None
        return self.correct and self.obedient


@dataclass(frozen=True)
class Reading:
    """How to split a model's answers: its markers, and whether its template opens a block."""

    markers: Markers
    opened_by_template: bool


def reading_of(written: Sequence[Written], markers: Markers, opens: bool | None) -> Reading:
    """How to split these answers; opens None: the chat template is not known.

    An unknown template is taken to open the block if any answer closes one that it did not open.
    """
    if opens is None:
        opens = any(_only_closes(one, markers) for one in written)
    return Reading(markers, opens)


def _only_closes(written: Written, markers: Markers) -> bool:
    text = written.text.lstrip()
    if written.reasoning is not None or markers.loose:
        return False
    opened = first(text, markers.opens, 0, len(text))
    closed = first(text, markers.closes(), 0, len(text))
    return closed is not None and (opened is None or closed[0] < opened[0])


def taken_apart(written: Written, how: Reading) -> tuple[Thought, int]:
    """Thinking and response, and the number of blocks, closed or open.

    Where a server has taken the thinking out, a block without a response was never closed.
    """
    if written.reasoning is not None:
        inner = written.reasoning.strip()
        rest = written.text.strip()
        again = _count(rest, how.markers, opened=False)
        return Thought(True, bool(rest) and not again[1], inner, rest), 1 + again[0]
    thought = split_thinking(written.text, how.markers, opened_by_template=how.opened_by_template)
    if not thought.opened:
        return thought, _count(written.text, how.markers, opened=False)[0]
    given = how.opened_by_template and not _begins(written.text, how.markers)
    return thought, _count(written.text, how.markers, opened=given)[0]


def _begins(text: str, markers: Markers) -> bool:
    return text.lstrip().startswith(markers.opens)


def _count(text: str, markers: Markers, *, opened: bool) -> tuple[int, bool]:
    """Blocks in the text, and whether the last one is open at its end."""
    blocks, _ = markers.scan(text, opened=(0, 0) if opened else None)
    end = blocks[-1].close[1] if blocks else 0
    is_open = (opened and not blocks) or first(text, markers.opens, end, len(text)) is not None
    return len(blocks) + is_open, is_open


def measure(asked: Asked, written: Written, how: Reading) -> Measured:
    """Everything about one answer. An answer whose block is not closed has no response.

    Without a block all of the text is the response, as a user would read it. Thinking that is not
    closed follows no instruction. RainError for an instruction that no rule can check.
    """
    thought, blocks = taken_apart(written, how)
    response = thought.response if thought.closed or not thought.opened else ""
    everything = f"{thought.thinking}\n{thought.response}"
    repeated = repetition(everything)
    thinking, answering = _lengths(thought, response, written.tokens, repeated.units)
    followed = _followed(asked, response, thought.thinking if thought.closed else "")
    foreign = [foreign_share(asked.text, part) for part in (thought.thinking, response)]
    return Measured(
        opened=thought.opened,
        closed=thought.closed,
        blocks=blocks,
        empty=thought.opened and thought.closed and not thought.thinking,
        finished=written.finished,
        thinking=thinking,
        answering=answering,
        repetition=repeated,
        foreign=0.0 if _other_language(asked) else max(foreign),
        correct=None if asked.key is None else asked.key.right(response),
        followed=followed[0],
        heeded=followed[1],
    )


def _followed(asked: Asked, response: str, thinking: str) -> list[tuple[bool, ...] | None]:
    """Of the instructions for the response and of those for the thinking; None without any."""
    found = follows(asked, response, thinking)
    pairs = list(zip(asked.instructions, found, strict=True))
    parts = [tuple(good for one, good in pairs if one.binds_thinking is of) for of in (False, True)]
    return [part or None for part in parts]


def _other_language(asked: Asked) -> bool:
    return any(item.rule == _OTHER_LANGUAGES for item in asked.instructions)


def _lengths(
    thought: Thought, response: str, tokens: int | None, units: int
) -> tuple[float, float]:
    total = float(units if tokens is None else tokens)
    characters = len(thought.thinking) + len(response)
    share = len(thought.thinking) / characters if characters else float(thought.opened)
    return total * share, total * (1 - share)


@dataclass(frozen=True)
class Fault:
    """A fault of answers. seen: whether an answer has it; None where it cannot have it."""

    name: str
    seen: Callable[[Measured], bool | None]


def _not(value: bool | None) -> bool | None:
    return None if value is None else not value


# In the order in which tables have them.
FAULTS = (
    Fault("no thinking block", lambda m: not m.opened),
    Fault("block never closed", lambda m: m.opened and not m.closed and m.finished),
    Fault("cut off while thinking", lambda m: m.opened and not m.closed and not m.finished),
    Fault("empty block", lambda m: m.empty),
    Fault("several blocks", lambda m: m.blocks > 1),
    Fault("no response", lambda m: m.closed and not m.answering),
    Fault("answer cut off", lambda m: m.opened and m.closed and not m.finished),
    Fault("loop", lambda m: m.looped),
    Fault("other language", lambda m: m.switched),
    Fault("wrong answer", lambda m: _not(m.correct)),
    Fault("instruction not followed", lambda m: _not(m.obedient)),
    Fault("thinking not as told", lambda m: _not(m.mindful)),
)


def faults(found: Measured) -> Iterator[str]:
    """The names of the faults of an answer; none for a good one."""
    return (fault.name for fault in FAULTS if fault.seen(found))
