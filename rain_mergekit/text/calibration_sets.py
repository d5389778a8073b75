"""Calibration sets: read them, render them through the chat template, find token positions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from rain_mergekit.errors import RainError
from rain_mergekit.system.json_samples import StrPath, read_samples
from rain_mergekit.system.wording import counted
from rain_mergekit.text.later_turns import LaterTurns
from rain_mergekit.text.markers import Markers
from rain_mergekit.text.rendering import Renderer, UnusableError
from rain_mergekit.text.samples import (
    InstructionSample,
    InstructionSpec,
    ReasoningSample,
    parse_instruction,
    parse_reasoning,
)
from rain_mergekit.text.token_positions import (
    Encoded,
    InstructionTokens,
    ReasoningTokens,
    SpanPositions,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PreTrainedTokenizerBase


S = TypeVar("S", ReasoningSample, InstructionSample)
T = TypeVar("T")
Spans = Literal["all", "prompt", "none"]
_DEFAULT_MARKERS = Markers()


@dataclass(frozen=True)
class DataSet(Generic[T]):
    """The usable part of a calibration set.

    Attributes:
        path: the file.
        sha256: of the file's bytes.
        total: how many samples the file has.
        samples: token positions of those that can be used.
        skipped: (source, reason), for a whole sample or for one instruction of a sample that is
            still used.
        read: the usable samples as they were rendered, in the order of `samples`.
        alone: (source, reason) of samples that stay a chat's first turn, as they cannot be used as
            its second.
    """

    path: str
    sha256: str
    total: int
    samples: tuple[T, ...]
    skipped: tuple[tuple[str, str], ...]
    read: tuple[ReasoningSample | InstructionSample, ...] = ()
    alone: tuple[tuple[str, str], ...] = ()

    @property
    def later(self) -> int:
        """How many samples are the second turn of a chat, after another sample's."""
        return sum(bool(one.before) for one in self.read)


def read_reasoning(path: StrPath) -> list[ReasoningSample]:
    """Read `{prompt, output}` or `{prompt, reasoning, response}` samples (JSON or JSONL).

    Raises RainError naming file, line and field.
    """
    return read_samples(path, parse_reasoning)[1]


def read_instruction(path: StrPath, *, spans_needed: bool = True) -> list[InstructionSample]:
    """Read instruction samples with their `related_prompt_list` of spans (JSON or JSONL).

    Without `spans_needed` a sample may lack that list. Raises RainError naming file, line and
    field.
    """
    return read_samples(path, partial(parse_instruction, spans_needed=spans_needed))[1]


def load_reasoning(  # noqa: PLR0913 - all but two by name
    path: StrPath,
    tokenizer: PreTrainedTokenizerBase,
    *,
    markers: Markers = _DEFAULT_MARKERS,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    window: int = 5,
    max_tokens: int | None = None,
    keep_response: bool = False,
    later: LaterTurns | None = None,
) -> DataSet[ReasoningTokens]:
    """Tokenise a reasoning set; ids end with the last close marker unless `keep_response`.

    later: which samples are to be a chat's second turn, and what goes before them.

    A sample that cannot be used is skipped with its reason. Raises RainError for a broken file,
    an unfit tokenizer, a template that refuses a sample, or if no sample is left.
    """

    def convert(sample: ReasoningSample, _: list[str]) -> ReasoningTokens:
        tokens = _encode(sample, renderer, tokenizer)
        length = len(tokens.input_ids) if keep_response else tokens.end
        _check_length(length, max_tokens)
        think = set(tokens.think(window))
        content = set(tokens.inside()) - think
        answers = set(tokens.answers()) - think - content
        return ReasoningTokens(
            source=sample.source,
            input_ids=tokens.input_ids[:length],
            think_positions=tuple(sorted(think)),
            content_positions=tuple(sorted(content)),
            prompt_positions=tuple(sorted({*range(tokens.end)} - think - content - answers)),
            response_positions=(*sorted(answers), *range(tokens.end, length)),
            open_starts=tuple(b.open.start for b in tokens.blocks if b.lead and b.marked),
            open_ends=tuple(block.open.stop for block in tokens.blocks),
            close_starts=tuple(block.close_start for block in tokens.blocks),
            lent_positions=tokens.lent(),
        )

    _check_options(window, max_tokens)
    renderer = Renderer(tokenizer, markers, chat_template_kwargs)
    return _load(path, parse_reasoning, convert, later)


def load_instruction(  # noqa: PLR0913 - all but two by name
    path: StrPath,
    tokenizer: PreTrainedTokenizerBase,
    *,
    markers: Markers = _DEFAULT_MARKERS,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    window: int = 5,
    max_tokens: int | None = None,
    spans: Spans = "all",
    later: LaterTurns | None = None,
) -> DataSet[InstructionTokens]:
    """Tokenise an instruction set and find the tokens of every instruction's spans.

    spans: which of an instruction's spans are looked for. all: those in prompt and response, and a
    sample must list one; prompt: the former alone (`asked_positions`), and none: no span, where a
    sample may list no instruction and stays without one that is not found. later: which samples are
    to be a chat's second turn, and what goes before them.

    A sample, or one instruction of it, that cannot be used is skipped with its reason. Raises
    RainError for a broken file, an unfit tokenizer, a template that refuses a sample, or if no
    sample is left.
    """

    def convert(sample: InstructionSample, notes: list[str]) -> InstructionTokens:
        tokens = _encode(sample, renderer, tokenizer)
        _check_length(len(tokens.input_ids), max_tokens)
        return InstructionTokens(
            source=sample.source,
            input_ids=tokens.input_ids,
            think_positions=tokens.think(window),
            thinking_positions=tokens.inside(),
            response_positions=tokens.response(),
            spans=_all_spans(sample, tokens, notes) if spans == "all" else (),
            answer_start=tokens.answer_start(),
            kept_positions=tokens.kept(window),
            asked_positions=tokens.asked(sample.instructions, notes) if spans == "prompt" else (),
        )

    _check_options(window, max_tokens)
    renderer = Renderer(tokenizer, markers, chat_template_kwargs)
    return _load(path, partial(parse_instruction, spans_needed=spans == "all"), convert, later)


def _load(
    path: StrPath,
    parse: Callable[[str, object], S],
    convert: Callable[[S, list[str]], T],
    later: LaterTurns | None,
) -> DataSet[T]:
    """Convert every sample; `convert` may add reasons for parts that it left out."""
    digest, samples = read_samples(path, parse)
    used: list[tuple[T, S]] = []
    skipped: list[tuple[str, str]] = []
    alone: list[tuple[str, str]] = []
    for sample in samples:
        try:
            tokens, taken, notes = _converted(sample, convert, later, alone)
            used.append((tokens, taken))
        except UnusableError as exc:
            notes = [str(exc)]
        skipped += [(sample.source, note) for note in notes]
    if not used:
        reasons = "; ".join(f"{source}: {reason}" for source, reason in skipped[:3])
        count = counted(len(samples), "sample")
        raise RainError(f"{path}: none of its {count} can be used ({reasons})")
    rows, read = zip(*used, strict=True)
    return DataSet(str(path), digest, len(samples), rows, tuple(skipped), read, tuple(alone))


def _converted(
    sample: S,
    convert: Callable[[S, list[str]], T],
    later: LaterTurns | None,
    alone: list[tuple[str, str]],
) -> tuple[T, S, list[str]]:
    """The tokens, the sample as it was taken, and notes; `alone` gets why it is no second turn."""
    given = sample if later is None else later.of(sample)
    reason = ""
    if given.before:
        notes: list[str] = []
        try:
            return convert(given, notes), given, notes
        except (UnusableError, RainError) as exc:  # a chat template may refuse that turn
            reason = str(exc)
    notes = []
    tokens = convert(sample, notes)
    if reason:
        alone.append((sample.source, reason))
    return tokens, sample, notes


def _encode(
    sample: ReasoningSample | InstructionSample,
    renderer: Renderer,
    tokenizer: PreTrainedTokenizerBase,
) -> Encoded:
    return encode(tokenizer, renderer.render(sample))


def _all_spans(
    sample: InstructionSample, tokens: Encoded, notes: list[str]
) -> tuple[SpanPositions, ...]:
    """Token positions of the usable instructions; UnusableError if there is none."""
    shared = tokens.in_output(sample.unrelated_response_spans)
    found: list[SpanPositions] = []
    for spec in sample.instructions:
        try:
            found.append(_spans(spec, tokens, shared))
        except UnusableError as exc:  # noqa: PERF203 - an instruction stands for itself
            notes.append(f"instruction {spec.instruction_id!r}: {exc}")
    if not found:
        raise UnusableError("; ".join(notes) or "it lists no instruction")
    return tuple(found)


def _spans(spec: InstructionSpec, tokens: Encoded, shared: tuple[int, ...]) -> SpanPositions:
    if not spec.prompt_spans or not spec.response_spans:
        missing = "response_spans" if spec.prompt_spans else "prompt_spans"
        raise UnusableError(f"its {missing} are empty")
    prompt = tokens.in_prompt(spec.prompt_spans)
    related = tokens.in_response(spec.response_spans)
    unrelated = tokens.in_output(spec.unrelated_response_spans)
    if not prompt or not related:
        raise UnusableError("no token holds one of its spans")
    # a token of both satisfies the instruction, so attention from it is no leakage
    rest = sorted({*shared, *unrelated} - set(related))
    return SpanPositions(spec.instruction_id, prompt, related, tuple(rest))


def _check_length(length: int, max_tokens: int | None) -> None:
    if max_tokens is not None and length > max_tokens:
        raise UnusableError(f"{length} tokens, more than max_tokens = {max_tokens}")


def _check_options(window: int, max_tokens: int | None) -> None:
    if window < 0:
        raise RainError(f"window must be 0 or more tokens, found {window}")
    if max_tokens is not None and max_tokens < 1:
        raise RainError(f"max_tokens must be 1 or more, found {max_tokens}")
