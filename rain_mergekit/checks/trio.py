"""Sanity checks of the three models together: refused unless the user accepts the outcome."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.checks.accept import refuse_unless_accepted
from rain_mergekit.checks.task_vector_size import check_task_vector
from rain_mergekit.checks.thinking_likelihood import Likelihood, beside, likelihood_of
from rain_mergekit.checks.tokenizers import check_tokenizers
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.models.loading import Trio
from rain_mergekit.system.memory import CALIBRATION, naming_shortage
from rain_mergekit.text.markers import Markers
from rain_mergekit.text.token_positions import ReasoningTokens

LOG = logging.getLogger(__name__)


def check_trio(
    trio: Trio,
    records: Mapping[str, Any],
    names: Collection[str],
    markers: Markers,
    settings: RainSettings,
) -> list[str]:
    """All checks that need no layer; returns accepted problems as warnings."""
    accept, gamma = settings.accept, settings.gamma
    checkpoints = trio.items()
    models = {role: str(checkpoint.reference) for role, checkpoint in checkpoints.items()}
    fingerprints = {role: record["fingerprint"] for role, record in records.items()}
    # rows of quantised models cannot be compared without their scales
    indices = {
        role: checkpoint.index for role, checkpoint in checkpoints.items() if checkpoint.plain
    }
    found = check_task_vector(models, fingerprints, indices, names, accept, gamma)
    folders = {role: checkpoint.path for role, checkpoint in checkpoints.items()}
    trust = trio.reasoning.trust_remote_code
    return found + check_tokenizers(folders, models, markers.words, accept, trust_remote_code=trust)


def check_thinking(
    found: Likelihood,
    layerwise: LayerwiseModel,
    trio: Trio,
    samples: Sequence[ReasoningTokens],
    accept: Collection[str],
) -> list[str]:
    """Refuse a reasoning model that does not think on its set; names another one that does."""
    LOG.info("the reasoning model %s", found)
    if found.thinks:
        return list(_outdone(found, layerwise, trio, samples, accept)) if found.open is None else []
    problem = (
        f"{trio.reasoning.reference} does not think on the reasoning set (on average it {found})"
    )
    if "no_thinking" not in accept:
        problem += _cause(layerwise, trio, samples)
    return [refuse_unless_accepted("no_thinking", problem, accept)]


def _cause(layerwise: LayerwiseModel, trio: Trio, samples: Sequence[ReasoningTokens]) -> str:
    for role, found in _others(layerwise, trio, samples):
        if found.thinks:
            name = trio.items()[role].reference
            return f": the {role} model {name} does ({found}), so the two are swapped"
    return ": the markers, the chat template or the set are another model's"


def _outdone(
    found: Likelihood,
    layerwise: LayerwiseModel,
    trio: Trio,
    samples: Sequence[ReasoningTokens],
    accept: Collection[str],
) -> Iterator[str]:
    """Where the template opens the block every model closes it, so compare the thinking itself.

    A pretrained model that finds it more likely is only a warning: with a set from elsewhere that
    can happen.
    """
    for role, other in _others(layerwise, trio, samples):
        if not found.outdone_by(other):
            continue
        problem = (
            f"the {role} model {trio.items()[role].reference} is more likely to write the thinking "
            f"of the reasoning set ({other.thinking:.2g} nats a token) than the reasoning model "
            f"{trio.reasoning.reference} ({found.thinking:.2g})"
        )
        if role == "instruct":
            yield refuse_unless_accepted(
                "no_thinking", f"{problem}, so the two are swapped", accept
            )
        else:
            yield f"{problem}: are the two swapped, or did another model write the set?"


def _others(
    layerwise: LayerwiseModel, trio: Trio, samples: Sequence[ReasoningTokens]
) -> Iterator[tuple[str, Likelihood]]:
    """The likelihoods of the other two models on the few shortest samples, instruct model first."""
    for role in ("instruct", "pretrained"):
        checkpoint = trio.items()[role]
        if checkpoint.path == trio.reasoning.path:
            continue  # it stands for the pretrained one
        with naming_shortage(f"while the {role} model reads the reasoning set", CALIBRATION):
            found = likelihood_of(beside(checkpoint, layerwise), samples)
        LOG.info("the %s model %s", role, found)
        if found is not None:
            yield role, found
