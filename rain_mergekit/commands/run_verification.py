"""What `verify` and `report` share: running both models over texts, with progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rain_mergekit.commands.console import Console
    from rain_mergekit.evaluation.answers import Behaviour
    from rain_mergekit.evaluation.layerwise_drift import VerifyOptions
    from rain_mergekit.evaluation.texts import Texts
    from rain_mergekit.evaluation.verify import VerificationResult
    from rain_mergekit.instructions.prompts import Asked
    from rain_mergekit.models.checkpoint import Checkpoint
    from rain_mergekit.text.calibration_sets import DataSet


def measure_on(
    reasoning: Checkpoint,
    merged: Checkpoint,
    texts: Texts,
    how: VerifyOptions,
    console: Console,
    threads: int | None = None,
) -> tuple[VerificationResult, DataSet[Any]]:
    """What was measured, and the set whose samples were used; says which were skipped."""
    from tqdm import tqdm  # noqa: PLC0415 - keeps --help fast

    from rain_mergekit.commands.thread_choice import threads_for_model  # noqa: PLC0415
    from rain_mergekit.evaluation.texts import read_texts  # noqa: PLC0415
    from rain_mergekit.evaluation.verify import measure_merge  # noqa: PLC0415
    from rain_mergekit.models.loading import read_model_config  # noqa: PLC0415

    samples, data = read_texts(reasoning, texts)
    if skipped := data.total - len(data.samples):
        source, reason = data.skipped[0]
        console.warn(f"{skipped} of {data.total} samples skipped, the first {source}: {reason}")
    layers = int(read_model_config(reasoning).num_hidden_layers)
    total = layers * sum(len(sample.input_ids) for sample in samples)
    with (
        threads_for_model(reasoning, threads),
        tqdm(total=total, unit="tok", unit_scale=True, disable=not console.progress) as progress,
    ):
        return measure_merge(reasoning, merged, samples, how, progress.update), data


def ask_both(
    models: Mapping[str, Checkpoint],
    asked: Sequence[Asked],
    how: tuple[Texts, int, VerifyOptions],
    console: Console,
    threads: int | None = None,
) -> dict[str, Behaviour]:
    """What the reasoning and the merged model write, summed up; warns of answers that were cut.

    how: the texts whose markers and template count, the token limit, and how models are run.
    """
    from tqdm import tqdm  # noqa: PLC0415

    from rain_mergekit.commands.thread_choice import threads_for_model  # noqa: PLC0415
    from rain_mergekit.evaluation.answers import behaviour  # noqa: PLC0415
    from rain_mergekit.evaluation.verify import answers_of  # noqa: PLC0415

    found = {}
    for name, checkpoint in models.items():
        with (
            threads_for_model(checkpoint, threads),
            tqdm(total=len(asked), desc=name, disable=not console.progress) as progress,
        ):
            found[name] = behaviour(answers_of(checkpoint, asked, *how, progress.update))
    if cut := found["merged"].cut:
        console.warn(
            f"{cut} of {len(asked)} answers were cut off while thinking at {how[1]} tokens, so "
            "nothing is known of their close markers; raise --max-new-tokens"
        )
    return found
