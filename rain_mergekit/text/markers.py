"""The texts that open and close a model's thinking: the known pairs, and finding them in a text.

Everything that reads or splits a model's output uses this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from rain_mergekit.errors import RainError

Span: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Block:
    """One thinking block: the [start, end) character ranges of its two markers."""

    open: Span
    close: Span
    opened_by_template: bool = False


@dataclass(frozen=True)
class Markers:
    """A pair of marker texts, and `more` pairs where a model has several.

    Pairs with the same opening are other ways to close it: the first to come closes the block, the
    longest of those that come first. The first pair is written where a block is put together, with
    `gaps` after the open marker, before the close marker and after it. `tokens`: what a tokenizer
    of this format has as tokens, where these are not the markers themselves. `loose`: the closing
    text ends other things too, so that outside of a block it means nothing. `optional`: a turn may
    have no block; then it counts as a whole. A pair of empty texts is no pair at all (NO_MARKERS).
    """

    open: str = "<think>"
    close: str = "</think>"
    more: tuple[tuple[str, str], ...] = ()
    gaps: tuple[str, str, str] = ("\n", "\n", "\n\n")
    tokens: tuple[str, ...] = ()
    loose: bool = False
    optional: bool = False

    def __post_init__(self) -> None:
        if not all(text.strip() for pair in self.pairs for text in pair):
            raise RainError("the thinking markers must not be blank")
        for opening in self.opens:
            for closing in self.closes():
                if opening in closing or closing in opening:
                    raise RainError(
                        f"the thinking markers {opening!r} and {closing!r} contain one another; "
                        "give two texts that can be told apart"
                    )

    def __str__(self) -> str:
        return ", ".join(f"{opening} … {closing}" for opening, closing in self.pairs) or "none"

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, str]]) -> Markers:
        """These pairs, with gaps, tokens and looseness of the known format that they belong to.

        NO_MARKERS without any.
        """
        if not pairs:
            return NO_MARKERS
        (first, last), *more = pairs
        made = cls(first, last, tuple(more))
        for known in KNOWN:
            if set(made.pairs) <= set(known.pairs):
                return replace(made, gaps=known.gaps, tokens=known.tokens, loose=known.loose)
        return made

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """All pairs, the first one first; none where nothing marks a block."""
        return ((self.open, self.close), *self.more) if self.open or self.close else ()

    @property
    def opens(self) -> tuple[str, ...]:
        """The texts that open a block."""
        return tuple(dict.fromkeys(opening for opening, _ in self.pairs))

    @property
    def words(self) -> tuple[str, ...]:
        """The texts that must be tokens: the format's own tokens, or the markers."""
        return self.tokens or tuple(dict.fromkeys(text for pair in self.pairs for text in pair))

    def closes(self, opening: str | None = None) -> tuple[str, ...]:
        """The texts that close the block of that opening; of an unknown one, every closing."""
        known = opening in self.opens
        return tuple(dict.fromkeys(c for o, c in self.pairs if not known or o == opening))

    def opening(self, text: str) -> str:
        """The open marker, with the white space after it, that `text` ends with, or ""."""
        for marker in sorted(self.opens, key=len, reverse=True):
            at = text.rfind(marker)
            if at >= 0 and not text[at + len(marker) :].strip():
                return text[at:]
        return ""

    def scan(
        self, text: str, start: int = 0, stop: int | None = None, opened: Span | None = None
    ) -> tuple[list[Block], list[str]]:
        """The blocks in text[start:stop] in order, and what is wrong with them in words.

        `opened` is the place of an open marker that the template wrote before `start` (of no
        width: it is not in this text).
        """
        stop = len(text) if stop is None else stop
        blocks: list[Block] = []
        wrong: list[str] = []
        span, at, given = opened, start if opened is None else opened[1], opened is not None
        while (span := span or first(text, self.opens, at, stop)) is not None:
            wrong += self._stray(text, at, span[0])
            end = self._close(text, span, stop, wrong)
            if end is None:
                return blocks, wrong
            blocks.append(Block(span, end, given))
            span, at, given = None, end[1], False
        return blocks, wrong + list(self._stray(text, at, stop))

    def _stray(self, text: str, start: int, stop: int) -> Iterator[str]:
        found = None if self.loose else first(text, self.closes(), start, stop)
        if found is not None:
            yield f"{text[slice(*found)]!r} comes without {_either(self.opens)} before it"

    def _close(self, text: str, span: Span, stop: int, wrong: list[str]) -> Span | None:
        opening = text[slice(*span)]
        closes = self.closes(opening)
        end = first(text, closes, span[1], stop)
        again = first(text, [opening] if opening else self.opens, span[1], end[0] if end else stop)
        if again is not None:
            wrong.append(f"{text[slice(*again)]!r} comes again before {_either(closes)}")
        if end is None:
            wrong.append(f"the block is not closed by {_either(closes)}")
        return end


def first(text: str, words: Iterable[str], start: int, stop: int) -> Span | None:
    """Where the first of the words is in text[start:stop]; the longest at that place."""
    places = [(at, -len(word)) for word in words if (at := text.find(word, start, stop)) >= 0]
    if not places:
        return None
    at, length = min(places)
    return at, at - length


def _either(words: Sequence[str]) -> str:
    return " or ".join(repr(word) for word in words)


_TIGHT = ("", "", "")
# Nothing marks a block: what a model wrote counts as a whole.
NO_MARKERS = Markers("", "", gaps=_TIGHT, optional=True)
_ANALYSIS = "<|channel|>analysis<|message|>"
# What published models write. docs/data.md has the same table, with the models.
KNOWN: tuple[Markers, ...] = (
    Markers("<think>", "</think>"),
    Markers("[THINK]", "[/THINK]", gaps=_TIGHT),
    Markers(
        _ANALYSIS,
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        more=((_ANALYSIS, "<|end|>"),),
        gaps=_TIGHT,
        tokens=("<|channel|>", "<|message|>", "<|end|>"),
        loose=True,
    ),
    Markers("<|begin_of_thought|>", "<|end_of_thought|>", gaps=("\n\n", "\n\n", "\n\n")),
    Markers("<seed:think>", "</seed:think>", gaps=("", "", "\n")),
    Markers("<thought>", "</thought>"),
    Markers("<thinking>", "</thinking>"),
    Markers("<reasoning>", "</reasoning>"),
    Markers(
        "<|START_THINKING|>",
        "<|END_THINKING|><|START_RESPONSE|>",
        more=(("<|START_THINKING|>", "<|END_THINKING|>"),),
        gaps=_TIGHT,
        tokens=("<|START_THINKING|>", "<|END_THINKING|>"),
    ),
    Markers("◁think▷", "◁/think▷", gaps=_TIGHT),
    Markers("<|channel>thought\n", "<channel|>", gaps=_TIGHT, tokens=("<|channel>", "<channel|>")),
)
