"""One tokenisation of a rendered sample, and the token positions of its parts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, compress
from typing import TYPE_CHECKING

from rain_mergekit.text.markers import Span
from rain_mergekit.text.rendering import Rendered, UnusableError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedTokenizerBase

    from rain_mergekit.text.samples import InstructionSpec


# A normalizer may drop a few characters; a wrongly loaded vocabulary silently drops whole words.
_MAX_LOST = 0.05


@dataclass(frozen=True)
class ReasoningTokens:
    """Token ids of one reasoning sample and sorted positions in them.

    `think_positions` is Ω_think; `content_positions` is the rest of the thinking blocks;
    `response_positions` is what the model wrote outside of its blocks: the last response, if it
    was kept, and earlier answers; `prompt_positions` is everything else. `open_starts` (of the
    blocks that the model opens itself) and `close_starts` are the markers' first tokens;
    `open_ends` (of all blocks) are the first tokens after the open markers. An output without a
    block is one block of its own: it has no open start, and its close start is its last token.
    `lent_positions` is an earlier turn of another sample.
    """

    source: str
    input_ids: tuple[int, ...]
    think_positions: tuple[int, ...]
    content_positions: tuple[int, ...]
    prompt_positions: tuple[int, ...]
    response_positions: tuple[int, ...]
    open_starts: tuple[int, ...]
    open_ends: tuple[int, ...]
    close_starts: tuple[int, ...]
    lent_positions: tuple[int, ...] = ()


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

    `think_positions` is Ω_think; `thinking_positions` is everything between the markers of a
    block; `answer_start` is the token that predicts the answer's first token; `kept_positions` are
    blocks after it, which are no part of the answer; `asked_positions` are the instructions in the
    prompt, where they are looked for.
    """

    source: str
    input_ids: tuple[int, ...]
    think_positions: tuple[int, ...]
    thinking_positions: tuple[int, ...]
    response_positions: tuple[int, ...]
    spans: tuple[SpanPositions, ...]
    answer_start: int = 0
    kept_positions: tuple[int, ...] = ()
    asked_positions: tuple[int, ...] = ()


@dataclass(frozen=True)
class TokenBlock:
    """One thinking block: token ranges of its markers, and how many tokens before it count.

    Both ranges are empty where nothing marks it.
    """

    open: range
    close: range
    lead: int

    @property
    def marked(self) -> bool:
        """Whether the block has markers."""
        return len(self.open) > 0

    @property
    def close_start(self) -> int:
        """The close marker's first token, or the last token inside of a block without markers."""
        return self.close.start if self.marked else max(self.close.start - 1, self.open.stop)

    def think(self, window: int) -> Iterator[int]:
        """Both markers, `window` tokens after the first and before the second, and the lead.

        The windows stay inside the block.
        """
        yield from range(max(self.open.start - self.lead, 0), self.open.stop)
        yield from range(self.open.stop, min(self.open.stop + window, self.close.start))
        yield from range(max(self.close.start - window, self.open.stop), self.close.stop)


@dataclass(frozen=True)
class Encoded:
    """Tokens of one rendered sample, and its thinking blocks in order (at least one)."""

    rendered: Rendered
    input_ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    blocks: tuple[TokenBlock, ...]

    @property
    def end(self) -> int:
        """The token after the last close marker."""
        return self.blocks[-1].close.stop

    def think(self, window: int) -> tuple[int, ...]:
        """Ω_think: the markers of every block with `window` tokens inside of each.

        If the template does not open a block itself, the token before its open marker belongs to
        it too: it decides that thinking starts.
        """
        return tuple(sorted({i for block in self.blocks for i in block.think(window)}))

    def inside(self) -> tuple[int, ...]:
        """The tokens between the markers of all blocks."""
        return tuple(i for b in self.blocks for i in range(b.open.stop, b.close.start))

    def response(self) -> tuple[int, ...]:
        """The tokens after the last close marker."""
        return tuple(range(self.end, len(self.input_ids)))

    def answers(self) -> tuple[int, ...]:
        """The tokens of `Rendered.answers`: what the model wrote before, outside of its blocks."""
        return self._within(self.rendered.answers)

    def ahead(self) -> tuple[int, ...]:
        """The tokens of `Rendered.ahead`: what the last turn says before its first block."""
        return self._within(self.rendered.ahead)

    def lent(self) -> tuple[int, ...]:
        """The tokens of `Rendered.lent`: an earlier turn of another sample."""
        return self._within(self.rendered.lent)

    def _within(self, places: Iterable[Span]) -> tuple[int, ...]:
        covered = bytearray(len(self.rendered.text))
        for start, stop in places:
            covered[start:stop] = b"\1" * (stop - start)
        return _overlapping(covered, self.offsets, range(self.end))

    def answer_start(self) -> int:
        """The token that predicts the answer's first token that is not white space.

        The answer is the response, and what stands ahead of the blocks. The text's length where it
        is empty.
        """
        for position in (*self.ahead(), *self.response()):
            start, end = self.offsets[position]
            if self.rendered.text[start:end].strip():
                return position - 1
        return len(self.input_ids)

    def kept(self, window: int) -> tuple[int, ...]:
        """The tokens of marked blocks, with windows, that begin after the answer does."""
        start = self.answer_start()
        later = [block for block in self.blocks if block.marked and block.open.start > start]
        inside = (range(block.open.stop, block.close.start) for block in later)
        marked = (block.think(window) for block in later)
        return tuple(sorted({*chain(*inside), *chain(*marked)}))

    def in_prompt(self, spans: Iterable[str]) -> tuple[int, ...]:
        """Tokens of every occurrence of `spans` in the texts of users and system."""
        before = range(self.blocks[-1].open.start)
        return self._positions(spans, self.rendered.prompt, before, "prompt")

    def asked(self, instructions: Iterable[InstructionSpec], notes: list[str]) -> tuple[int, ...]:
        """Tokens of all instructions in the prompt, sorted; `notes` gets why one is left out."""
        found: set[int] = set()
        for one in instructions:
            try:
                found.update(self.in_prompt(one.prompt_spans))
            except UnusableError as exc:  # noqa: PERF203 - an instruction stands for itself
                notes.append(f"instruction {one.instruction_id!r}: {exc}")
        return tuple(sorted(found))

    def in_response(self, spans: Iterable[str]) -> tuple[int, ...]:
        """Tokens of every occurrence of `spans` after the last close marker."""
        place = (self.rendered.blocks[-1].close[1], len(self.rendered.text))
        return self._positions(spans, [place], range(self.end, len(self.offsets)), "response")

    def in_output(self, spans: Iterable[str]) -> tuple[int, ...]:
        """Tokens of every occurrence in the response; of spans missing there, in the thinking."""
        start = self.rendered.blocks[-1].close[1]
        text = self.rendered.text
        elsewhere = [span for span in spans if text.find(span, start) < 0]
        inside = [(block.open[1], block.close[0]) for block in self.rendered.blocks]
        tokens = range(self.blocks[0].open.stop, self.blocks[-1].close.start)
        found = self._positions(elsewhere, inside, tokens, "response or thinking")
        return tuple(sorted({*found, *self.in_response(s for s in spans if s not in elsewhere)}))

    def _positions(
        self, spans: Iterable[str], places: Iterable[Span], tokens: range, part: str
    ) -> tuple[int, ...]:
        covered, text = bytearray(len(self.rendered.text)), self.rendered.text
        for span in spans:
            found = [_cover(covered, text, span, place) for place in places]
            if not any(found):
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
    offsets: tuple[tuple[int, int], ...] = tuple(batch["offset_mapping"])
    if (lost := _lost(rendered.text, offsets)) > _MAX_LOST:
        raise UnusableError(
            f"the tokenizer loses {lost:.0%} of the text, so it is not the one this model was "
            "trained with; check how it is loaded (PreTrainedTokenizerFast obeys tokenizer.json)"
        )
    return Encoded(
        rendered=rendered,
        input_ids=tuple(batch["input_ids"]),
        offsets=offsets,
        blocks=tuple(
            TokenBlock(
                open=_marker(rendered, offsets, block.open),
                close=_marker(rendered, offsets, block.close),
                lead=0 if block.opened_by_template else 1,
            )
            for block in rendered.blocks
        ),
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
    if place[0] == place[1]:  # no marker: where the first token from there on begins
        ends = (index for index, (_, end) in enumerate(offsets) if end > place[0])
        at = next(ends, len(offsets))
        return range(at, at)
    covered = bytearray(len(rendered.text))
    covered[place[0] : place[1]] = b"\1" * (place[1] - place[0])
    found = _overlapping(covered, offsets, range(len(offsets)))
    if not found:
        raise UnusableError(
            f"the tokenizer drops the marker {rendered.text[place[0] : place[1]]!r}"
        )
    return range(found[0], found[-1] + 1)


def _cover(covered: bytearray, text: str, span: str, place: tuple[int, int]) -> bool:
    """Mark the characters of every occurrence; False if there is none."""
    done = at = text.find(span, *place)
    while at >= 0:
        end = at + len(span)
        covered[max(at, done) : end] = b"\1" * (end - max(at, done))
        done, at = end, text.find(span, at + 1, place[1])
    return done >= 0


def _overlapping(
    covered: bytearray, offsets: tuple[tuple[int, int], ...], tokens: range
) -> tuple[int, ...]:
    """Those of `tokens` that contain a marked character.

    A character that is several tokens (bytes) has its offsets on all of them, so all are found.
    """
    first, last = covered.find(1), covered.rfind(1)  # few tokens are near what is marked
    near = (i for i in tokens if offsets[i][1] > first and offsets[i][0] <= last)
    return tuple(i for i in near if covered.find(1, *offsets[i]) >= 0)


def _short(text: str, width: int = 60) -> str:
    return repr(text if len(text) <= width else text[: width - 1] + "…")
