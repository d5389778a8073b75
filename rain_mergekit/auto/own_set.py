"""Does the reasoning model think on a set? If not, it writes a set of its own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from rain_mergekit.auto.request import Request
from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.checks.thinking_likelihood import likelihood_of
from rain_mergekit.commands.asking import Asking
from rain_mergekit.commands.data_build import build
from rain_mergekit.commands.data_options import BuildOptions
from rain_mergekit.commands.data_reasoning import candidate
from rain_mergekit.commands.options import Loading, Talk
from rain_mergekit.data_building.prompts import gather_prompts
from rain_mergekit.evaluation.texts import Texts, read_texts
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.loading import default_dtype, read_model_config
from rain_mergekit.publish.layout import FOLDER
from rain_mergekit.text.markers import Markers

LOG = logging.getLogger(__name__)
_NAME = "own-reasoning.jsonl"
_PROBED = 4


def texts_of(request: Request, path: str, count: int | None = None) -> Texts:
    """That set, read as the calibration reads it."""
    return Texts(
        path=path,
        count=count,
        markers=Markers.of(request.markers) if request.markers else None,
        chat_template_kwargs=request.chat_template_kwargs,
        optional=request.blocks == "optional",
    )


def thinks_on(reasoning: Checkpoint, path: str, request: Request, run: RunOptions) -> bool:
    """Whether the model finds the thinking markers of a few samples likely.

    One layer of the model is in memory at a time. RainError if no sample can be used.
    """
    samples, _ = read_texts(reasoning, texts_of(request, path, _PROBED))
    config = read_model_config(reasoning)
    dtype = run.dtype or default_dtype(config, run.device)
    found = likelihood_of(LayerwiseModel.open(reasoning, config, dtype, run.device), samples)
    LOG.info("the reasoning model %s", found)
    return found is not None and found.thinks


def write_own_set(
    model: str,
    prompts: Sequence[str],
    out: Path,
    request: Request,
    how: tuple[RunOptions, Loading, Talk],
) -> str:
    """`data reasoning` with this model and these files of prompts; returns the path of the set.

    Without files the model answers the prompts of both packaged sets. It goes on where an earlier
    run was interrupted. RainError if no answer can be kept.
    """
    run, loading, talk = how
    path = str(out / FOLDER / _NAME)
    asking = Asking(
        server=None,
        max_new_tokens=request.max_new_tokens,
        temperature=None,
        top_p=None,
        seed=request.seed,
        batch_size=8,
        parallel=1,
        timeout=1.0,
        retries=0,
        api_key_env=None,
        extra_body={},
        sampling_of=None,
        continuous=False,
        device=run.device,
        dtype=None if run.dtype is None else str(run.dtype).removeprefix("torch."),
    )
    options = BuildOptions(
        model=model,
        prompts=tuple(prompts),
        output=path,
        count=None,
        attempts=1,
        markers=request.markers,
        chat_template_kwargs=request.chat_template_kwargs,
        asking=asking,
        loading=loading,
        talk=talk,
    )
    build(gather_prompts(prompts), candidate, options, talk.console())
    return path
