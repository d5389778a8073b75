"""How a model other than the reasoning model reads the instruction set, aligned at the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rain_mergekit.text.markers import Markers
from rain_mergekit.text.rendering import Renderer, UnusableError
from rain_mergekit.text.samples import InstructionSample
from rain_mergekit.text.token_positions import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class AnswerReading:
    """Token ids of one sample, of which the last `answer` ones are the answer's.

    asked: positions of the instructions in the prompt, sorted.
    """

    source: str
    input_ids: tuple[int, ...]
    answer: int
    asked: tuple[int, ...] = ()


def read_answers(
    samples: Sequence[InstructionSample],
    tokenizer: PreTrainedTokenizerBase,
    markers: Markers,
    chat_template_kwargs: Mapping[str, Any],
    *,
    without_instructions: bool = False,
    asked_needed: bool = False,
) -> dict[str, AnswerReading | str]:
    """Render and tokenise each sample; by source, the tokens, or why there are none.

    The template is the tokenizer's own; a reason says why a sample cannot be read. The answer
    begins with the token that predicts its first token. without_instructions: the instructions'
    spans are cut out of the prompt. asked_needed: they are looked for in it; what is missing is
    left out, as it is told where the sample is first read.
    """
    renderer = Renderer(tokenizer, markers, chat_template_kwargs)
    readings: dict[str, AnswerReading | str] = {}
    for sample in samples:
        try:
            asked = _without_spans(sample) if without_instructions else sample
            tokens = encode(tokenizer, renderer.render(asked))
        except UnusableError as error:
            readings[sample.source] = str(error)
            continue
        answer = len(tokens.input_ids) - tokens.answer_start()
        places = tokens.asked(sample.instructions, []) if asked_needed else ()
        readings[sample.source] = AnswerReading(sample.source, tokens.input_ids, answer, places)
    return readings


def _without_spans(sample: InstructionSample) -> InstructionSample:
    spans = [span for spec in sample.instructions for span in spec.prompt_spans]
    if not spans:
        raise UnusableError("it lists no instruction")

    def cut(text: str) -> str:
        for span in sorted(spans, key=len, reverse=True):
            text = text.replace(span, "")
        return " ".join(text.split(" ")).strip() if text.strip() else text

    messages = tuple(
        {**message, "content": cut(message["content"])}
        if message["role"] != "assistant"
        else message
        for message in sample.messages
    )
    shorter = replace(sample, prompt=cut(sample.prompt), messages=messages)
    if not (shorter.prompt.strip() or shorter.messages):
        raise UnusableError("nothing of its prompt is left without its instructions")
    return shorter
