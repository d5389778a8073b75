"""The calibration precompute: models and data in, one calibration file out, layer by layer."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rain_mergekit.calibration.assemble import assemble
from rain_mergekit.calibration.engine import CalibrationEngine
from rain_mergekit.calibration.estimate import Estimate
from rain_mergekit.calibration.expert_entries import fits
from rain_mergekit.calibration.header import Origin, RunRecord
from rain_mergekit.calibration.job import CalibrationJob
from rain_mergekit.calibration.layer_file import LayerResultFile, read_part
from rain_mergekit.calibration.layer_names import matrix_names, stored_names
from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.samples import Samples
from rain_mergekit.calibration.stream_engine import StreamEngine
from rain_mergekit.calibration.work_folder import WorkDir
from rain_mergekit.calibration_file.writer import write_calibration
from rain_mergekit.checks.answer_likelihood import swapped_answers_hint
from rain_mergekit.checks.host_plan import require_found, require_shared
from rain_mergekit.checks.trio import check_thinking, check_trio
from rain_mergekit.checks.vocabulary_sizes import warnings_of
from rain_mergekit.config.merge_config import RainConfig
from rain_mergekit.config.method_names import AIM
from rain_mergekit.errors import RainError
from rain_mergekit.models.adapters import adapter_digest
from rain_mergekit.models.experts import experts_budget
from rain_mergekit.models.fingerprint import fingerprint
from rain_mergekit.models.loading import Trio
from rain_mergekit.models.merge_names import lost_tensors, merge_names
from rain_mergekit.system.atomic_file import destination
from rain_mergekit.system.determinism import deterministic
from rain_mergekit.system.distributed import World, join, leave
from rain_mergekit.system.loader_choice import require_loader
from rain_mergekit.system.profile import WRITE, phase


@dataclass(frozen=True)
class CalibrationSummary:
    """What a finished calibration reports.

    Attributes:
        path: the calibration file.
        seconds: how long it took.
        bytes: size of the file.
        layers: decoder layers of the model.
        first_layer: 0, or the layer from which an interrupted calibration continued.
        mean_rank: mean rank of the bases, or of the low-rank changes with `fit: streams`.
        samples: what was read from the two sets.
        layer_passes: samples times layers that were run, by purpose.
        warnings: what the user should know.
    """

    path: Path
    seconds: float
    bytes: int
    layers: int
    first_layer: int
    mean_rank: float
    samples: Samples
    layer_passes: dict[str, int]
    warnings: tuple[str, ...]


def calibrate(config: RainConfig, options: RunOptions) -> CalibrationSummary:
    """Run the calibration that `config` describes and write the file that it names.

    Raises RainError for anything wrong with the input; then no calibration file is written.
    """
    start = time.monotonic()
    require_loader(options.loader, ahead=options.read_ahead)
    _check_writable(config.calibration)
    world = join(options.device)
    try:
        with (
            deterministic(world.device, wanted=options.deterministic),
            experts_budget(options.experts_budget),
        ):
            return _calibrate(config, options, world, start)
    finally:
        leave(world)


def plan(config: RainConfig, options: RunOptions) -> Estimate:
    """What `calibrate` would need, from file headers and token counts; nothing is run."""
    with experts_budget(options.experts_budget):
        return _engine(CalibrationJob.of(config, options, World(torch.device("cpu")))).estimate()


def _calibrate(
    config: RainConfig, options: RunOptions, world: World, start: float
) -> CalibrationSummary:
    job = CalibrationJob.of(config, options, world)
    trio, samples, models = job.trio, job.samples, _model_records(job.trio)
    run = _engine(job)
    require_found(trio.items())
    accept = config.settings.accept
    names = merge_names(trio.config, run.layerwise.tensors)
    advice = warnings_of(config, trio, lost_tensors(run.layerwise.tensors, names))
    matrices = matrix_names(run.layerwise)
    require_shared(trio.items(), trio.config, names, matrices)
    tensors = stored_names(run.layerwise, matrices)
    noted = check_trio(trio, models, tensors, samples.markers, config.settings)
    identity = job.identity(models)
    with WorkDir.beside(
        config.calibration, identity, world, every=options.snapshot_seconds
    ) as work:
        first, likely = run.walk(work)
        world.wait()
        if config.method != AIM:  # it is the reasoning model that ran
            noted += check_thinking(likely, run.layerwise, trio, samples.reasoning.samples, accept)
        if world.rank == 0:
            hint = swapped_answers_hint(trio, run.layerwise, job.compared)
            advice += [hint] if hint else []
        parts = [read_part(work.part(index)) for index in range(run.parts)]
        record = RunRecord(
            dtype=job.dtype,
            device=identity["device"],
            tokenizer=identity["tokenizer"],
            likelihood=likely.rounded(),
            deterministic=options.deterministic,
        )
        origin = Origin(config.method, models, identity["data"], config.settings, record)
        warnings: tuple[str, ...] = ()
        if world.rank == 0:
            header, sources = assemble(origin, parts, names, matrices, [*noted, *advice])
            with phase(WRITE):
                write_calibration(config.calibration, header.to_json(), sources)
            warnings = tuple(header.warnings)
    return CalibrationSummary(
        path=config.calibration,
        seconds=time.monotonic() - start,
        bytes=config.calibration.stat().st_size,
        layers=len(run.indices),
        first_layer=first,
        mean_rank=_mean_rank(parts),
        samples=samples,
        layer_passes=run.layer_passes(),
        warnings=warnings,
    )


def _engine(job: CalibrationJob) -> CalibrationEngine | StreamEngine:
    return StreamEngine.of(job) if job.settings.fit == "streams" else CalibrationEngine.of(job)


def _model_records(trio: Trio) -> dict[str, Any]:
    return {
        role: {
            "reference": str(checkpoint.reference),
            "revision": checkpoint.revision,
            "fingerprint": fingerprint(checkpoint.path),
            **_adapter(checkpoint.path),
        }
        for role, checkpoint in trio.items().items()
    }


def _adapter(folder: str) -> dict[str, str]:
    digest = adapter_digest(folder)
    return {} if digest is None else {"adapter": digest}


def _mean_rank(parts: Sequence[LayerResultFile]) -> float:
    ranks = [int(site["rank"]) for part in parts for site in part.sites.values()]
    ranks += [int(fit["rank"]) for part in parts for _, fit in fits(part.tensors)]
    return sum(ranks) / max(1, len(ranks))


def _check_writable(path: Path) -> None:
    folder = destination(path).parent
    try:
        if not path.is_symlink():  # no folder is created behind a link
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RainError(
            f"{folder}: cannot write the calibration file there ({error.strerror}); choose another "
            "`parameters.calibration`, or give yourself write permission"
        ) from None
