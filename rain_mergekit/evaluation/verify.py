"""All that `verify` measures of a merged model, and the verdict."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.data_building.local import LocalWriter
from rain_mergekit.data_building.tasks import Sampling, Task, Written
from rain_mergekit.errors import RainError
from rain_mergekit.evaluation.answer_measures import Measured, Reading, measure
from rain_mergekit.evaluation.answers import Behaviour, longer, worse
from rain_mergekit.evaluation.comparable import check_same_tokens
from rain_mergekit.evaluation.divergence import Drift
from rain_mergekit.evaluation.layerwise_drift import (
    LayerDrift,
    StreamedModel,
    Tick,
    VerifyOptions,
    feature_drift,
    token_drift,
)
from rain_mergekit.evaluation.marker_distance import MarkerDistanceProfile
from rain_mergekit.evaluation.texts import Texts, markers_of
from rain_mergekit.evaluation.unrounded_merge import Unrounded
from rain_mergekit.instructions.prompts import Asked
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.loading import read_model_config
from rain_mergekit.text.token_positions import ReasoningTokens

LOG = logging.getLogger(__name__)
_BATCH = 16  # answers at a time


@dataclass(frozen=True)
class VerificationResult:
    """How far a merged model is from the reasoning model, on texts with thinking.

    Attributes:
        layers: drift of the hidden features, one entry a layer, by input site.
        drift: divergence of the next-token distributions, by place, and the verdict.
        around: the same by distance from the markers.
        unrounded: the drift that the merge would have without the rounding of its weights; None
            where that is not known.
        unknown: why it is not known.
    """

    layers: tuple[LayerDrift, ...]
    drift: Drift
    around: MarkerDistanceProfile
    unrounded: Drift | None
    unknown: str | None


def measure_merge(
    reasoning: Checkpoint,
    merged: Checkpoint,
    samples: Sequence[ReasoningTokens],
    how: VerifyOptions,
    tick: Tick = lambda _tokens: None,
) -> VerificationResult:
    """Run the samples through the models, a layer of each in memory at a time.

    `tick` is told of the tokens that passed a layer.
    """
    check_same_tokens(reasoning, merged)
    sides = [StreamedModel.of(reasoning, how), StreamedModel.of(merged, how)]
    unknown = None
    try:
        sides.append(_unrounded(reasoning, merged, sides[0], how))
    except RainError as error:
        unknown = str(error)
    with tempfile.TemporaryDirectory(prefix="rain-verify-") as folder:
        try:
            for number, side in enumerate(sides):
                side.embed(samples, how.budget // len(sides), Path(folder, str(number)))
            layers = tuple(feature_drift(sides, samples, tick))
            found = [token_drift(sides[0], side, samples) for side in sides[1:]]
        finally:
            for side in sides:
                side.close()
    unrounded = found[1][0] if len(found) > 1 else None
    return VerificationResult(layers, *found[0], unrounded, unknown)


def _unrounded(
    reasoning: Checkpoint, merged: Checkpoint, anchor: StreamedModel, how: VerifyOptions
) -> StreamedModel:
    if anchor.layerwise.dtype != torch.float32:
        raise RainError("it is only visible with --dtype float32")
    config = read_model_config(reasoning)
    layerwise = LayerwiseModel.open(reasoning, config, torch.float32, how.device)
    return StreamedModel(layerwise, Unrounded.of(merged.path, layerwise, how.load).fill)


def answers_of(
    checkpoint: Checkpoint,
    asked: Sequence[Asked],
    texts: Texts,
    limit: int,
    how: VerifyOptions,
    tick: Tick = lambda _done: None,
) -> list[Measured]:
    """What the model, loaded as a whole, writes to each prompt, greedily, in `limit` tokens.

    texts: what it is measured on, for the markers and the arguments of the chat template.
    """
    template = dict(texts.chat_template_kwargs)
    writer = LocalWriter(
        checkpoint,
        Sampling(limit, temperature=0.0, top_p=None, seed=0),
        device=how.device,
        dtype=how.dtype,
        batch_size=_BATCH,
        chat_template_kwargs=template,
    )
    markers = markers_of(texts, writer.tokenizer)
    reading = Reading(markers, writer.opens_block("probe", markers))
    found: dict[str, Written] = {}
    for written in writer.write([Task(text) for text in {a.text for a in asked}], lambda _: False):
        found.update({task.prompt: one for task, one in written})
        tick(len(written))
    return [measure(prompt, found[prompt.text], reading) for prompt in asked]


def verdict(drift: Drift | None, merged: Behaviour | None, reasoning: Behaviour | None) -> str:
    """`kept`, `at risk` or `damaged`: by L_think, and by what the answers show.

    Whatever is worse than before, and not by chance, is damage; answers that are twice as long put
    it at risk. drift None: it was not measured, and answers decide alone.
    """
    found = "kept" if drift is None else drift.verdict
    if merged is None or reasoning is None:
        return found
    if worse(merged, reasoning):
        return "damaged"
    return "at risk" if found == "kept" and longer(merged, reasoning) else found
