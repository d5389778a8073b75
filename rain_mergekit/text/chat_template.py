"""The tokenizer's chat template: one conversation rendered, and where its texts are in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jinja2

from rain_mergekit.errors import RainError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rain_mergekit.text.markers import Span


Message: TypeAlias = Mapping[str, Any]
_PROBE = "RAINPROMPTPROBE{}END"
# A template is a program by the model's author; these are the errors that it can raise.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """Renders conversations with `options`, the template's own arguments (`enable_thinking`, …)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
        self.name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "chat_template", None):
            raise RainError(
                f"the tokenizer {self.name} has no chat template; add the reasoning model's own "
                "chat_template.jinja, calibration has to see what the model sees"
            )
        self._tokenizer, self._options = tokenizer, dict(options)
        self._known: dict[tuple[str, ...], list[str] | None] = {}

    def render(self, source: str, messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
        """The conversation up to where the model goes on. Raises RainError if it is refused."""
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) or None,
                add_generation_prompt=True,
                tokenize=False,
                **self._options,
            )
        except _TEMPLATE_ERRORS as exc:
            raise RainError(
                f"{source}: the chat template of {self.name} refuses this sample: {exc}"
            ) from exc
        if not isinstance(text, str):
            raise RainError(f"{source}: the chat template of {self.name} did not give one text")
        return text

    def takes_turns(self) -> bool:
        """Whether a chat may have a second turn, of which both questions are shown."""
        asked = [{"role": "user", "content": _PROBE.format(index)} for index in range(2)]
        said = {"role": "assistant", "content": "Yes."}
        try:
            text = self.render("probe", [asked[0], said, asked[1]])
        except RainError:
            return False
        return all(message["content"] in text for message in asked)

    def locate(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any] = ()
    ) -> list[Span] | None:
        """The place in `text` of every message that the model did not write; None if unclear.

        Searching for the texts alone would confuse a prompt "user" with the role's name.
        """
        wanted = [str(m["content"] or "") for m in messages if m["role"] != "assistant"]
        frames = self._frames(messages, tools)
        found = None if frames is None else _between(text, frames, wanted)
        return found or _unique(text, wanted)

    def _frames(self, messages: Sequence[Message], tools: Sequence[Any]) -> list[str] | None:
        roles = tuple(str(message["role"]) for message in messages)
        plain = not tools and all(len(m) == 2 and m["role"] != "assistant" for m in messages)
        if not plain:
            return self._probe(messages, tools)
        if roles not in self._known:
            self._known[roles] = self._probe(messages, tools)
        return self._known[roles]

    def _probe(self, messages: Sequence[Message], tools: Sequence[Any]) -> list[str] | None:
        """The parts that the template and the model write around the other texts."""
        asked = [
            m if m["role"] == "assistant" else {**m, "content": _PROBE.format(index)}
            for index, m in enumerate(messages)
        ]
        try:
            rest = self.render("probe", asked, tools)
        except RainError:
            return None  # the first sample's error message explains it
        frames = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                frame, _, rest = rest.partition(_PROBE.format(index))
                frames.append(frame)
        whole = not any("RAINPROMPTPROBE" in frame for frame in (*frames, rest))
        return [*frames, rest] if whole else None


def _between(text: str, frames: Sequence[str], wanted: Sequence[str]) -> list[Span] | None:
    """Where the texts are between the frames; the template may have stripped white space."""
    places: list[Span] = []
    at = 0
    for frame, own, after in zip(frames, wanted, frames[1:], strict=False):
        start, last = at + len(frame), len(places) == len(wanted) - 1
        for kept in (own, own.strip(), own.lstrip(), own.rstrip()):
            at = start + len(kept)
            fits = text[at:] == after if last else text.startswith(after, at)
            if fits and text.startswith(frame + kept, start - len(frame)):
                places.append((start, at))
                break
        else:
            return None
    return places


def _unique(text: str, wanted: Sequence[str]) -> list[Span] | None:
    """Where each text is, provided that each occurs once and in order."""
    places: list[Span] = []
    for own in wanted:
        kept = own if text.count(own) == 1 else own.strip()
        if not kept or text.count(kept) != 1:
            return None
        places.append((text.index(kept), text.index(kept) + len(kept)))
    return places if places == sorted(places) else None
