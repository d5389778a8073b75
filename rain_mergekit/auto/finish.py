"""After the merge: write the record, measure the thinking, and draw a page of both."""

from __future__ import annotations

import hashlib
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rain_mergekit.auto.own_set import texts_of
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.commands import verify_text
from rain_mergekit.commands.console import Console
from rain_mergekit.commands.read_weights import digests_with_bar
from rain_mergekit.commands.run_verification import measure_on
from rain_mergekit.config.merge_config import RainConfig
from rain_mergekit.errors import RainError
from rain_mergekit.evaluation import verification_record
from rain_mergekit.evaluation.layerwise_drift import VerifyOptions
from rain_mergekit.evaluation.verify import VerificationResult
from rain_mergekit.evaluation.weight_change import relative_weight_change
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.loading import open_checkpoint, open_model
from rain_mergekit.publish.layout import CONFIG, HELD_OUT, MERGE_CONFIG, REASONING, REPORT
from rain_mergekit.publish.record import make_record, read_record, write_record
from rain_mergekit.report.model_card import write_card
from rain_mergekit.system.atomic_file import replacing
from rain_mergekit.system.json_samples import file_digest

if TYPE_CHECKING:
    from rain_mergekit.auto.job import Job

_OWN = "the calibration's own texts: held-out ones say more"
_SAMPLES = 8


def merged_already(out: Path, config: RainConfig) -> bool:
    """Whether the weights in `out` are those of this configuration and its calibration file."""
    try:
        record = read_record(out)
    except RainError:
        return False
    there = (out / "config.json").exists() and (out / MERGE_CONFIG).exists()
    same = record.run.get("config_sha256") == _digest(config.text)
    return there and same and record.calibration == file_digest(config.calibration)


def write_down(job: Job, out: Path, config: RainConfig, console: Console) -> None:
    """reproduce.json: reads all weights once."""
    run = {
        "config_sha256": _digest(config.text),
        "seed": job.request.seed,
        "threads": torch.get_num_threads(),
        "deterministic": job.run.deterministic,
        "merge_device": job.merge_options.device,
    }
    tensors = digests_with_bar(out, console)
    write_record(out, make_record(config, run, (job.command,), tensors))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def measure_and_tell(job: Job, out: Path, config: RainConfig, console: Console) -> str:
    """Measure the thinking unless that is done, write card and page; returns the verdict."""
    known = verification_record.load(out)
    verdict = _measure(job, out, config, console) if known is None else known.verdict
    write_card(out)
    console.heading(f"Verdict: {verify_text.MEANING[verdict]}")
    _next(out, config.settings.fit, console)
    return verdict


def _measure(job: Job, out: Path, config: RainConfig, console: Console) -> str:
    reasoning = open_model(config.reasoning, job.run.load)
    merged = open_checkpoint(str(out), job.run.load)
    held_out = out / HELD_OUT
    path = str(held_out if held_out.exists() else out / REASONING)
    how = VerifyOptions(job.run.load, job.run.device, job.run.dtype, job.run.activation_budget)
    console.print(f"Measuring what it did to the thinking, on {Path(path).name}")
    texts = texts_of(job.request, path, _SAMPLES)
    found, data = measure_on(reasoning, merged, texts, how, console)
    for line in verify_text.drift_lines(found.drift):
        console.print(line)
    _write_report(out, config, (reasoning, merged), found, console)
    verification_record.save(out, found.drift, data.path, data.sha256)
    return found.drift.verdict


def _write_report(
    out: Path,
    config: RainConfig,
    models: tuple[Checkpoint, Checkpoint],
    found: VerificationResult,
    console: Console,
) -> None:
    if find_spec("matplotlib") is None:
        console.print("No page of pictures: pip install 'rain-mergekit[report]' for one")
        return
    from rain_mergekit.report.merge_pictures import Merged  # noqa: PLC0415 - imports matplotlib
    from rain_mergekit.report.page import render  # noqa: PLC0415

    file = CalibrationFile.open(config.calibration)
    try:
        moved = relative_weight_change(file, *models)
        note = "" if (out / HELD_OUT).exists() else _OWN
        page = render(file, Merged(out.name, moved, found, note))
    finally:
        file.close()
    with replacing(out / REPORT) as goal:
        goal.write(page.encode("utf-8", "replace"))
    console.print(f"Wrote {out / REPORT}")


def _next(out: Path, fit: str, console: Console) -> None:
    place = shlex.quote(str(out))
    console.print(f"The merged model is in {place}. The same again: {out / CONFIG}")
    if fit == "projection":  # where the streams are fitted, lambda is no knob
        console.print(
            f"Other strengths: mergekit-rain sweep {place}/{CONFIG} --lambda 0.5,1.5 -o DIR"
        )
    console.print(f"Publish it, privately: mergekit-rain push {place} OWNER/NAME")
