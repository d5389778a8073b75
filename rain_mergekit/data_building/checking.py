"""What a calibration would make of a set: counts, reasons, and one sample with its spans."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rain_mergekit.errors import RainError
from rain_mergekit.system.json_samples import JsonObject, StrPath, read_samples
from rain_mergekit.text.calibration_sets import (
    DataSet,
    load_instruction,
    load_reasoning,
    read_instruction,
    read_reasoning,
)
from rain_mergekit.text.markers import Markers
from rain_mergekit.text.rendering import Renderer, UnusableError
from rain_mergekit.text.samples import InstructionSample, ReasoningSample
from rain_mergekit.text.token_positions import Encoded, encode

PLAIN, MARKER, PROTECTED, INSTRUCTION, FOLLOWS, UNRELATED = range(6)
_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@dataclass(frozen=True)
class Checked:
    """A set as a calibration reads it; `samples` are those of the file, usable or not."""

    kind: str
    data: DataSet[Any]
    samples: Sequence[ReasoningSample | InstructionSample]
    tokenizer: PreTrainedTokenizerBase
    markers: Markers
    window: int
    chat_template_kwargs: Mapping[str, Any]


def check_set(
    path: StrPath,
    tokenizer: PreTrainedTokenizerBase | None,
    markers: Markers,
    window: int,
    chat_template_kwargs: Mapping[str, Any],
) -> Checked:
    """Read, render and tokenise every sample; the fields tell which of the two sets it is.

    Without a tokenizer, characters count as tokens. Raises RainError as the readers do.
    """
    kinds = {
        isinstance(value, JsonObject) and "related_prompt_list" in value
        for value in read_samples(path, lambda _source, value: value)[1]
    }
    if len(kinds) > 1:
        raise RainError(
            f"{path}: some samples have 'related_prompt_list' and some have not; an instruction "
            "set has it in all of them, a reasoning set in none"
        )
    if kinds == {True}:
        samples: Sequence[Any] = read_instruction(path)
        load: Any = load_instruction
    else:
        samples, load = read_reasoning(path), load_reasoning
    found = tokenizer or characters(markers if _opened(samples, markers) else None)
    template = chat_template_kwargs if tokenizer else {}
    data = load(path, found, markers=markers, chat_template_kwargs=template, window=window)
    kind = "instruction" if kinds == {True} else "reasoning"
    return Checked(kind, data, samples, found, markers, window, template)


def _opened(samples: Sequence[Any], markers: Markers) -> bool:
    """Whether the template probably writes the open marker: no output contains it."""
    return all(s.output is not None and markers.open not in s.output for s in samples)


def characters(opened: Markers | None) -> PreTrainedTokenizerBase:
    """A tokenizer with one token a character, and a chat template that may open the block."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))  # noqa: S106 - no password
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    build: Any = PreTrainedTokenizerFast  # it has no types
    fast: PreTrainedTokenizerBase = build(tokenizer_object=tokenizer)
    fast.chat_template = _TEMPLATE + (opened.open if opened else "")
    return fast


def segments(checked: Checked, number: int) -> list[tuple[str, int]]:
    """The text of a usable sample (counted from 1) as the model sees it, in runs of one style.

    Raises RainError if there is no such sample.
    """
    used = [sample.source for sample in checked.data.samples]
    if not 1 <= number <= len(used):
        raise RainError(f"--show {number}: there are {len(used)} usable samples, counted from 1")
    sample = next(s for s in checked.samples if s.source == used[number - 1])
    renderer = Renderer(checked.tokenizer, checked.markers, checked.chat_template_kwargs)
    encoded = encode(checked.tokenizer, renderer.render(sample))
    styles = bytearray(len(encoded.rendered.text))
    _paint(styles, encoded, encoded.think(checked.window), PROTECTED)
    if isinstance(sample, InstructionSample):
        _paint_spans(styles, encoded, sample)
    for start, end in chain(*((block.open, block.close) for block in encoded.rendered.blocks)):
        styles[start:end] = bytes([MARKER]) * (end - start)
    return _runs(encoded.rendered.text, styles)


def _paint_spans(styles: bytearray, encoded: Encoded, sample: InstructionSample) -> None:
    for spec in sample.instructions:
        unrelated = (*sample.unrelated_response_spans, *spec.unrelated_response_spans)
        _paint(styles, encoded, _found(encoded.in_response, unrelated), UNRELATED)
        _paint(styles, encoded, _found(encoded.in_prompt, spec.prompt_spans), INSTRUCTION)
    for spec in sample.instructions:  # last: a token of both satisfies its instruction
        _paint(styles, encoded, _found(encoded.in_response, spec.response_spans), FOLLOWS)


def _found(find: Callable[[list[str]], tuple[int, ...]], spans: Sequence[str]) -> set[int]:
    """Tokens of the spans that are found; one unusable instruction does not spoil the sample."""
    tokens: set[int] = set()
    for span in spans:
        with suppress(UnusableError):
            tokens.update(find([span]))
    return tokens


def _paint(styles: bytearray, encoded: Encoded, tokens: Iterable[int], style: int) -> None:
    for token in tokens:
        start, end = encoded.offsets[token]
        styles[start:end] = bytes([style]) * (end - start)


def _runs(text: str, styles: bytearray) -> list[tuple[str, int]]:
    """Runs of one style; white space between two of the same style has it too."""
    for gap in re.finditer(r"\s+", text):
        start, end = gap.span()
        if start > 0 and end < len(text) and styles[start - 1] == styles[end]:
            styles[start:end] = bytes([styles[end]]) * (end - start)
    runs, at = [], 0
    for style, members in groupby(styles):
        length = len(list(members))
        runs.append((text[at : at + length], style))
        at += length
    return runs
