"""From a sample's text to the one string the model sees, and where its parts are in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2

from .errors import RainError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .samples import InstructionSample, ReasoningSample

_PROBE = "RAINPROMPTPROBE"
# A template is a program of the model's author: what it can raise, without the interpreter's own.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class UnusableError(Exception):
    """A sample, or one instruction of it, that has to be skipped; the text is the reason."""


@dataclass(frozen=True)
class Markers:
    """The texts that open and close the thinking block."""

    open: str = "<think>"
    close: str = "</think>"

    def __post_init__(self) -> None:
        if not (self.open.strip() and self.close.strip()):
            raise RainError("The thinking markers must not be blank.")
        if self.open in self.close or self.close in self.open:
            raise RainError(
                f"The thinking markers {self.open!r} and {self.close!r} contain one another; "
                "give two texts that can be told apart."
            )


@dataclass(frozen=True)
class Rendered:
    """One rendered sample; ``prompt``, ``open``, ``close`` are [start, end) character ranges."""

    text: str
    prompt: tuple[int, int]
    open: tuple[int, int]
    close: tuple[int, int]
    opened_by_template: bool


class Renderer:
    """Puts samples through a tokenizer's chat template.

    Raises RainError if the tokenizer has no chat template or no character offsets (slow tokenizer).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, markers: Markers) -> None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "chat_template", None):
            raise RainError(
                f"The tokenizer {name} has no chat template; add the reasoning model's own "
                "chat_template.jinja, calibration has to see what the model sees."
            )
        if not getattr(tokenizer, "is_fast", False):
            raise RainError(
                f"The tokenizer {name} gives no character offsets; a fast tokenizer "
                "(tokenizer.json) is needed."
            )
        self._tokenizer, self._name, self.markers = tokenizer, name, markers
        self._frame = self._probe()

    def render(self, sample: ReasoningSample | InstructionSample) -> Rendered:
        """The rendered prompt, continued by ``output`` as it is or by the assembled parts.

        Raises RainError if the template refuses the sample, UnusableError if the prompt or the
        thinking block cannot be located without doubt.
        """
        head = self._template(sample.source, sample.prompt)
        place = self._locate(head, sample.prompt)
        opened = self._template_marker(head[place[1] :])
        if sample.output is None:
            body = self._assemble(opened, sample.reasoning or "", sample.response)
        else:
            body = self._without_opening(sample.output, opened)
        return self._join(head, place, opened, body)

    def _template(self, source: str, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        try:
            text = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except _TEMPLATE_ERRORS as exc:
            raise RainError(
                f"{source}: the chat template of {self._name} refuses this sample: {exc}"
            ) from exc
        if not isinstance(text, str):
            raise RainError(f"{source}: the chat template of {self._name} did not give one text.")
        return text

    def _probe(self) -> tuple[str, str] | None:
        """What the template writes before and after a prompt, if that can be told."""
        try:
            parts = self._template("probe", _PROBE).split(_PROBE)
        except RainError:
            return None  # the first sample will say why
        return (parts[0], parts[1]) if len(parts) == 2 else None

    def _locate(self, head: str, prompt: str) -> tuple[int, int]:
        """The prompt's own range; a search alone would mistake "user" for the role's name."""
        before, after = self._frame or ("", "")
        start, end = len(before), len(head) - len(after)
        framed = head.startswith(before) and head.endswith(after) and start <= end
        if framed and head[start:end].strip() == prompt.strip():
            return start, end
        for text in (prompt, prompt.strip()):
            if head.count(text) == 1:
                return head.index(text), head.index(text) + len(text)
        raise UnusableError("the chat template does not keep the prompt's text as it is")

    def _template_marker(self, tail: str) -> str:
        """The open marker and the white space after it that the template ends with, or ""."""
        bare = tail.rstrip()
        start = len(bare) - len(self.markers.open)
        opened = tail[start:] if bare.endswith(self.markers.open) else ""
        rest = tail.removesuffix(opened)
        if self.markers.open in rest or self.markers.close in rest:
            raise UnusableError(
                "the chat template writes a thinking block of its own after the prompt"
            )
        return opened

    def _assemble(self, opened: str, reasoning: str, response: str | None) -> str:
        """Open marker, reasoning, close marker on lines of their own, a blank line, response."""
        start = "" if opened else self.markers.open
        gap = "" if opened[-1:].isspace() else "\n"
        answer = "" if response is None else f"\n\n{response}"
        return f"{start}{gap}{reasoning}\n{self.markers.close}{answer}"

    def _without_opening(self, output: str, opened: str) -> str:
        """``output`` less the open marker that the template has already written."""
        if not opened:
            return output
        if output.startswith(opened):
            return output[len(opened) :]
        bare = output.lstrip()
        return bare[len(self.markers.open) :] if bare.startswith(self.markers.open) else output

    def _join(self, head: str, place: tuple[int, int], opened: str, body: str) -> Rendered:
        marks = self.markers
        for marker, expected in ((marks.open, 0 if opened else 1), (marks.close, 1)):
            if (found := body.count(marker)) != expected:
                where = "after the chat template's open marker" if opened else "after the prompt"
                raise UnusableError(f"{found} times {marker!r} {where}, expected {expected}")
        start = len(head) - len(opened) if opened else len(head) + body.index(marks.open)
        stop = len(head) + body.index(marks.close)
        if stop < start:
            raise UnusableError(f"{marks.close!r} comes before {marks.open!r}")
        return Rendered(
            text=head + body,
            prompt=place,
            open=(start, start + len(marks.open)),
            close=(stop, stop + len(marks.close)),
            opened_by_template=bool(opened),
        )
