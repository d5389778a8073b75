"""Render a sample to the one string that the model sees, and locate its parts in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rain_mergekit.errors import RainError
from rain_mergekit.text.chat_template import ChatTemplate, Message
from rain_mergekit.text.markers import Block, Markers, Span, first
from rain_mergekit.text.samples import InstructionSample, ReasoningSample
from rain_mergekit.text.thinking_blocks import split_thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_ASKING = ("user", "system", "developer")


class UnusableError(Exception):
    """A sample, or one instruction of it, must be skipped; the message is the reason."""


@dataclass(frozen=True)
class Rendered:
    """One rendered sample; all places are [start, end) character ranges, in order.

    `prompt` holds the texts of users and system, `blocks` every thinking block, `answers` what the
    model wrote outside of them before the last one: each with what ends its turn. `ahead` is what
    the last turn says before its first block, where blocks are optional. `lent` is an earlier turn
    of another sample; its texts are in no `prompt`.
    """

    text: str
    prompt: tuple[Span, ...]
    blocks: tuple[Block, ...]
    answers: tuple[Span, ...] = ()
    ahead: tuple[Span, ...] = ()
    lent: tuple[Span, ...] = ()


class Renderer:
    """Puts samples through a tokenizer's chat template.

    Raises RainError if the tokenizer has no chat template or no character offsets (slow tokenizer).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        markers: Markers,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._template = ChatTemplate(tokenizer, chat_template_kwargs or {})
        if not getattr(tokenizer, "is_fast", False):
            raise RainError(
                f"the tokenizer {self._template.name} gives no character offsets; a fast tokenizer "
                "(tokenizer.json) is needed"
            )
        self.markers = markers

    def render(self, sample: ReasoningSample | InstructionSample) -> Rendered:
        """The rendered conversation, continued by `output` or by the assembled parts.

        Raises RainError if the template refuses the sample, UnusableError if the prompt or a
        thinking block cannot be located without doubt.
        """
        messages = sample.conversation
        head, places, opened = self._head(sample)
        begun = ""
        if sample.output is None:
            body = self._assemble(opened, sample.reasoning or "", sample.response)
        else:
            body = self._without_opening(sample.output, opened)
            begun = "" if opened else self._begun(head[places[-1][1] :], body)
            body = body[len(begun) :]
        others = [m for m in messages if m["role"] != "assistant"]
        said = list(zip(places, others, strict=True))
        asked = (p for p, m in said if m["role"] in _ASKING and not sample.is_lent(m))
        lent = ((p[0], after[0][0]) for (p, m), after in pairwise(said) if sample.is_lent(m))
        lead = head[places[-1][1] : len(head) - len(opened)]
        earlier = self._earlier(head, messages, places, lead if opened else "")
        last = self._last(head, opened, body)
        if sample.output is None and len(last) > 1:
            raise UnusableError("its thinking or its response holds markers of its own")
        answers = [*self._answers(head, messages, places, lead)]
        if len(last) > 1:
            answers.append((last[0].close[1], last[-1].open[0]))
        text, start = head + body, len(head) - len(begun)
        if not last:
            last = [_unmarked(sample, start, text)]
        ahead = [(start, last[0].open[0])] if self.markers.optional and not opened else []
        return Rendered(
            text=text,
            prompt=tuple(asked),
            blocks=(*earlier, *last),
            answers=(*answers, *ahead),
            ahead=tuple(ahead),
            lent=tuple(lent),
        )

    def with_opening(self, sample: InstructionSample) -> InstructionSample:
        """The sample whose verbatim output has the open marker that this template writes, too.

        Other models can read that sample, whether their templates write the marker or not. Raises
        as `render` does.
        """
        if sample.output is None:
            return sample
        opened = self._head(sample)[2]
        return replace(sample, output=opened + self._without_opening(sample.output, opened))

    def _head(self, sample: ReasoningSample | InstructionSample) -> tuple[str, list[Span], str]:
        """The rendered prompt, the places of its texts, and what of it opens the last block."""
        head = self._template.render(sample.source, sample.conversation, sample.tools)
        places = self._template.locate(head, sample.conversation, sample.tools)
        if places is None:
            raise UnusableError("the chat template does not keep the prompt's text as it is")
        return head, places, self._opening(head[places[-1][1] :])

    def _opening(self, tail: str) -> str:
        """The open marker and the white space after it that the template ends with, or ""."""
        opened = self.markers.opening(tail)
        words = self.markers.opens if self.markers.loose else self._words()
        if first(tail, words, 0, len(tail) - len(opened)) is not None:
            raise UnusableError(
                "the chat template writes a thinking block of its own after the prompt; if it "
                "can be told to think, do so by rain.chat_template_kwargs, such as "
                "{enable_thinking: true}"
            )
        return opened

    def _words(self) -> tuple[str, ...]:
        return (*self.markers.opens, *self.markers.closes())

    def _marker(self, opened: str) -> str:
        found = first(opened, self.markers.opens, 0, len(opened))
        return opened[slice(*found)] if found else ""

    def _begun(self, tail: str, output: str) -> str:
        """The beginning of `output` that the template has already written, or "".

        Without markers: a model that is to think may have a template that opens the block.
        """
        if not self.markers.optional:
            return ""
        sizes = range(min(len(tail), len(output)), 0, -1)
        written = (output[:size] for size in sizes if tail.endswith(output[:size]))
        return next((text for text in written if text.strip()), "")

    def _assemble(self, opened: str, reasoning: str, response: str | None) -> str:
        """Open marker, reasoning, close marker and response, with the format's own white space."""
        if not self.markers.pairs:
            raise UnusableError("without markers it must be given as 'output', verbatim")
        after_open, before_close, after_close = self.markers.gaps
        start = "" if opened else self.markers.open
        gap = "" if opened[-1:].isspace() else after_open
        closes = self.markers.closes(self._marker(opened) or self.markers.open)
        answer = "" if response is None else f"{after_close}{response}"
        return f"{start}{gap}{reasoning}{before_close}{closes[0]}{answer}"

    def _without_opening(self, output: str, opened: str) -> str:
        """`output` less the open marker that the template has already written."""
        if not opened or output.startswith(opened):
            return output[len(opened) :]
        bare, marker = output.lstrip(), self._marker(opened)
        return bare[len(marker) :] if bare.startswith(marker) else output

    def _last(self, head: str, opened: str, body: str) -> list[Block]:
        """The blocks of the model's last turn; UnusableError if one that must be is not, or broken.

        None is left only where blocks are optional.
        """
        at = len(head) - len(opened)
        given = first(head, self.markers.opens, at, len(head)) if opened else None
        blocks, wrong = self.markers.scan(head + body, len(head), opened=given)
        if not (blocks or wrong or self.markers.optional):
            wrong = [f"no {self.markers.open!r} after the prompt"]
        if wrong:
            raise UnusableError(wrong[0])
        return blocks

    def _earlier(
        self, head: str, messages: Sequence[Message], places: Sequence[Span], lead: str
    ) -> Iterator[Block]:
        """The blocks of the model's earlier turns that the template has kept.

        The template wrote them: broken or empty blocks there are no reason to skip the sample.
        """
        for _, start, stop in _turns(messages, places):
            for block in self.markers.scan(head, start, stop)[0]:
                if head[block.open[1] : block.close[0]].strip():
                    given = bool(lead) and head.endswith(lead, 0, block.open[0])
                    yield Block(block.open, block.close, given)

    def _answers(
        self, head: str, messages: Sequence[Message], places: Sequence[Span], lead: str
    ) -> Iterator[Span]:
        """From where the answer of each earlier turn begins to where the next message does.

        `lead` is what the template writes before a turn. Thinking blocks between an answer's parts
        lie in its range, too.
        """
        for said, start, stop in _turns(messages, places):
            blocks = self.markers.scan(head, start, stop)[0]
            at = start + len(lead) * head.startswith(lead, start, stop)
            own = split_thinking(said, self.markers).response
            yield (blocks[0].close[1] if blocks else max(head.find(own, at, stop), at)), stop


def _turns(messages: Sequence[Message], places: Sequence[Span]) -> Iterator[tuple[str, int, int]]:
    """The model's earlier turns: what was said, and the range between the other texts."""
    passed = 0
    for message, following in pairwise(messages):
        passed += message["role"] != "assistant"
        if message["role"] == "assistant" and following["role"] != "assistant" and passed:
            yield str(message["content"] or ""), places[passed - 1][1], places[passed][0]


def _unmarked(sample: ReasoningSample | InstructionSample, start: int, text: str) -> Block:
    """What counts as the block of an output without one, from `start` to the end of `text`.

    In the set of what must stay it is the whole output; in that of what comes it is empty, so that
    the whole output is the answer.
    """
    if not text[start:].strip():
        raise UnusableError("its output is empty")
    end = start if isinstance(sample, InstructionSample) else len(text)
    return Block((start, start), (end, end))
