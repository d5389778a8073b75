"""Merges that can be computed and that nobody wants: named, and refused unless accepted."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rain_mergekit.accepting import judge
from rain_mergekit.capture import Shell
from rain_mergekit.data import ReasoningTokens
from rain_mergekit.markers import Markers
from rain_mergekit.models import Trio, load_tokenizer
from rain_mergekit.task_vector import check_task_vector
from rain_mergekit.thinks import Likelihood, likelihood_of
from rain_mergekit.tokens import disagreements

LOG = logging.getLogger(__name__)
# Without any of them transformers makes an empty tokenizer up.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def check_trio(
    trio: Trio,
    records: Mapping[str, Any],
    names: Collection[str],
    markers: Markers,
    accept: Collection[str],
) -> list[str]:
    """What can be told before any layer is computed; returns what was accepted, as warnings."""
    checkpoints = trio.items()
    models = {role: str(checkpoint.reference) for role, checkpoint in checkpoints.items()}
    fingerprints = {role: record["fingerprint"] for role, record in records.items()}
    indices = {role: checkpoint.index for role, checkpoint in checkpoints.items()}
    found = check_task_vector(models, fingerprints, indices, names, accept)
    return found + _check_tokens(trio, markers, accept)


def _check_tokens(trio: Trio, markers: Markers, accept: Collection[str]) -> list[str]:
    own = load_tokenizer(trio.reasoning)
    found: list[str] = []
    for role in ("instruct", "pretrained"):
        checkpoint = trio.items()[role]
        if not any(Path(checkpoint.path, name).exists() for name in _TOKENIZERS):
            LOG.info("the %s model comes without a tokenizer: not compared", role)
            continue
        other = load_tokenizer(checkpoint)
        who = f"the {role} model {checkpoint.reference}"
        problems = disagreements(own, other, who, markers.words)
        found += [judge("other_tokens", problem, accept) for problem in problems]
    return found


def check_thinking(
    found: Likelihood,
    shell: Shell,
    trio: Trio,
    samples: Sequence[ReasoningTokens],
    accept: Collection[str],
) -> list[str]:
    """Refuse a reasoning model that does not think on its set; says if the instruct model does."""
    LOG.info("the reasoning model %s", found)
    if found.thinks:
        return []
    problem = (
        f"{trio.reasoning.reference} does not think on the reasoning set (on average it {found})"
    )
    if "no_thinking" not in accept:
        other = likelihood_of(trio.instruct, trio, shell, samples)
        problem += (
            f": the instruct model {trio.instruct.reference} does ({other}), so the two are swapped"
            if other.thinks
            else ": the markers, the chat template or the set are another model's"
        )
    return [judge("no_thinking", problem, accept)]
