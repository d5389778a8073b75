"""One tokenisation of a rendered sample, and the token positions of its parts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING

from .rendering import Rendered, UnusableError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerBase

# A normalizer may drop a few characters; a wrongly loaded vocabulary silently drops whole words.
_MAX_LOST = 0.05


@dataclass(frozen=True)
class ReasoningTokens:
    """Token ids of one reasoning sample and sorted positions in them.

    ``think_positions`` is Ω_think; ``content_positions`` is the rest of the thinking block;
    ``response_positions`` is empty unless the response was kept. ``open_start`` (None where the
    template opens the block) and ``close_start`` are the markers' first tokens.
    """

    source: str
    input_ids: tuple[int, ...]
    think_positions: tuple[int, ...]
    content_positions: tuple[int, ...]
    response_positions: tuple[int, ...]
    open_start: int | None
    close_start: int


@dataclass(frozen=True)
class SpanPositions:
    """Sorted token positions of one instruction: I, R and U of Eqs. 9-10."""

    instruction_id: str
    prompt: tuple[int, ...]
    related: tuple[int, ...]
    unrelated: tuple[int, ...]


@dataclass(frozen=True)
class InstructionTokens:
    """Token ids of one instruction sample and sorted positions in them.

    ``think_positions`` is Ω_think; ``thinking_positions`` is everything between the markers.
    """

    source: str
    input_ids: tuple[int, ...]
    think_positions: tuple[int, ...]
    thinking_positions: tuple[int, ...]
    response_positions: tuple[int, ...]
    spans: tuple[SpanPositions, ...]


@dataclass(frozen=True)
class Encoded:
    """Tokens of one rendered sample; ``open`` and ``close`` are the markers' token ranges."""

    rendered: Rendered
    input_ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    open: range
    close: range

    def think(self, window: int) -> tuple[int, ...]:
        """Both markers, ``window`` tokens after the first and before the second.

        The windows stay inside the block. If the template does not open the block itself, the
        token before the open marker belongs to it too: it decides that thinking starts.
        """
        lead = 0 if self.rendered.opened_by_template else 1
        first = range(max(self.open.start - lead, 0), self.open.stop + window)
        last = range(max(self.close.start - window, self.open.start), self.close.stop)
        return tuple(i for i in sorted({*first, *last}) if i < self.close.stop)

    def inside(self) -> tuple[int, ...]:
        """The tokens between the markers."""
        return tuple(range(self.open.stop, self.close.start))

    def response(self) -> tuple[int, ...]:
        """The tokens after the close marker."""
        return tuple(range(self.close.stop, len(self.input_ids)))

    def in_prompt(self, spans: Iterable[str]) -> tuple[int, ...]:
        """Tokens of every occurrence of ``spans`` in the prompt's own text."""
        place = self.rendered.prompt
        return self._positions(spans, place, range(self.open.start), "prompt")

    def in_response(self, spans: Iterable[str]) -> tuple[int, ...]:
        """Tokens of every occurrence of ``spans`` after the close marker."""
        place = (self.rendered.close[1], len(self.rendered.text))
        return self._positions(spans, place, range(self.close.stop, len(self.offsets)), "response")

    def _positions(
        self, spans: Iterable[str], place: tuple[int, int], tokens: range, part: str
    ) -> tuple[int, ...]:
        covered = bytearray(len(self.rendered.text))
        for span in spans:
            if not _cover(covered, self.rendered.text, span, place):
                raise UnusableError(f"the {part} does not contain the span {_short(span)}")
        return _overlapping(covered, self.offsets, tokens)


def encode(tokenizer: PreTrainedTokenizerBase, rendered: Rendered) -> Encoded:
    """Tokenise the whole string once, without adding special tokens (the template has them)."""
    batch = tokenizer(
        rendered.text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        padding=False,
        truncation=False,
        verbose=False,
    )
    offsets = tuple((int(start), int(end)) for start, end in batch["offset_mapping"])
    if (lost := _lost(rendered.text, offsets)) > _MAX_LOST:
        raise UnusableError(
            f"the tokenizer loses {lost:.0%} of the text, so it is not the one this model was "
            "trained with; check how it is loaded (PreTrainedTokenizerFast obeys tokenizer.json)"
        )
    return Encoded(
        rendered=rendered,
        input_ids=tuple(int(token) for token in batch["input_ids"]),
        offsets=offsets,
        open=_marker(rendered, offsets, rendered.open),
        close=_marker(rendered, offsets, rendered.close),
    )


def _lost(text: str, offsets: tuple[tuple[int, int], ...]) -> float:
    """The share of the characters (white space aside) that no token holds."""
    missing = bytearray(b"\1" * len(text))
    for start, end in offsets:
        missing[start:end] = bytes(end - start)
    return len("".join("".join(compress(text, missing)).split())) / max(len(text), 1)


def _marker(
    rendered: Rendered, offsets: tuple[tuple[int, int], ...], place: tuple[int, int]
) -> range:
    covered = bytearray(len(rendered.text))
    covered[place[0] : place[1]] = b"\1" * (place[1] - place[0])
    found = _overlapping(covered, offsets, range(len(offsets)))
    if not found:
        raise UnusableError(
            f"the tokenizer drops the marker {rendered.text[place[0] : place[1]]!r}"
        )
    return range(found[0], found[-1] + 1)


def _cover(covered: bytearray, text: str, span: str, place: tuple[int, int]) -> bool:
    """Mark the characters of every occurrence (they may overlap); False if there is none."""
    done = at = text.find(span, *place)
    while at >= 0:
        end = at + len(span)
        covered[max(at, done) : end] = b"\1" * (end - max(at, done))
        done, at = end, text.find(span, at + 1, place[1])
    return done >= 0


def _overlapping(
    covered: bytearray, offsets: tuple[tuple[int, int], ...], tokens: range
) -> tuple[int, ...]:
    """Those of ``tokens`` that hold a marked character (a token of no width holds none).

    A character that is several tokens (bytes) has its offsets on all of them, so all are found.
    """
    return tuple(i for i in tokens if covered.find(1, *offsets[i]) >= 0)


def _short(text: str, width: int = 60) -> str:
    return repr(text if len(text) <= width else text[: width - 1] + "…")
