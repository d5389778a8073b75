"""Which of two models would rather write the instruction set's answers? A hint at swapped roles."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.checks.thinking_likelihood import (
    beside,
    last_states,
    log_likelihoods,
    shortest,
)
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.loading import Trio
from rain_mergekit.system.evenly_spaced import evenly_spaced
from rain_mergekit.system.memory import CALIBRATION, naming_shortage
from rain_mergekit.text.token_positions import InstructionTokens

# Nats a token. Nothing is refused: on one of the testbed's five trios the pretrained model likes
# the answers better although it follows no instruction, by more than any limit could allow for.
_LIMIT = 0.02
# With less than this, in nats a token, a model would not write the answers at all.
_WRITES = -1.5
_TOKENS = 64


def compared_texts(trio: Trio, samples: Sequence[InstructionTokens]) -> list[InstructionTokens]:
    """A few short samples with answers; none where the pretrained model is the reasoning model."""
    if trio.pretrained.path == trio.reasoning.path:
        return []
    return shortest(s for s in samples if s.answer_start < len(s.input_ids) - 1)


def swapped_answers_hint(
    trio: Trio, layerwise: LayerwiseModel, few: Sequence[InstructionTokens]
) -> str | None:
    """A warning where the pretrained model is likelier to write the answers than the instruct one.

    few: of `compared_texts`; each model reads all before an answer as the calibration does. None
    where there are no texts, or a vocabulary ends before the tokens do.
    """
    if not few:
        return None
    found = {
        role: _likelihood(role, trio.items()[role], layerwise, few)
        for role in ("instruct", "pretrained")
    }
    instruct, pretrained = found["instruct"], found["pretrained"]
    if instruct is None or pretrained is None:
        return None
    if pretrained < _WRITES or pretrained <= instruct + _LIMIT:
        return None
    return (
        f"the pretrained model {trio.pretrained.reference} is likelier to write the answers of the "
        f"instruction set ({pretrained:.3g} nats a token) than the instruct model "
        f"{trio.instruct.reference} ({instruct:.3g}): are the two roles swapped? A hint alone, as "
        "some trios are like that"
    )


def _likelihood(
    role: str, checkpoint: Checkpoint, layerwise: LayerwiseModel, few: Sequence[InstructionTokens]
) -> float | None:
    """The mean log-likelihood of the answers' tokens, in nats."""
    other = beside(checkpoint, layerwise)
    with naming_shortage(f"while the {role} model reads the instruction set", CALIBRATION):
        states = last_states(other, [sample.input_ids for sample in few])
        if states is None:
            return None
        rows, tokens = [], list[int]()
        for sample, hidden in zip(few, states, strict=True):
            places = range(sample.answer_start + 1, len(sample.input_ids))
            for place in evenly_spaced(places, _TOKENS):
                rows.append(hidden[place - 1].cpu())
                tokens.append(sample.input_ids[place])
        return fmean(log_likelihoods(other, rows, tokens))
