"""What other programs may call; `import rain_mergekit` offers all of it lazily.

Everything else in the package is private and may change in any release.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rain_mergekit.calibration import pipeline
from rain_mergekit.calibration.estimate import Estimate
from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import CalibrationSummary
from rain_mergekit.calibration.shape_plan import plan_shape
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.config.merge_config import read_config
from rain_mergekit.dequantize.plain_view import open_plain
from rain_mergekit.errors import RainError
from rain_mergekit.evaluation.layerwise_drift import VerifyOptions
from rain_mergekit.evaluation.texts import Texts, read_texts
from rain_mergekit.evaluation.verify import VerificationResult, measure_merge
from rain_mergekit.linalg.factors import Factors
from rain_mergekit.merge_method.method import register
from rain_mergekit.models.loading import LoadOptions

__all__ = [
    "CalibrationFile",
    "CalibrationSummary",
    "Estimate",
    "LoadOptions",
    "RainError",
    "RunOptions",
    "VerificationResult",
    "calibrate",
    "estimate",
    "estimate_shape",
    "merge",
    "project",
    "register",
    "verify",
]

StrPath = str | os.PathLike[str]


def calibrate(config: StrPath, options: RunOptions | None = None) -> CalibrationSummary:
    """Write the calibration file that a merge configuration names.

    Args:
        config: path of the YAML, with a `rain:` section. Relative paths in it are taken from the
            working folder.
        options: device, dtype, memory budget; by default float32 on the CPU and 2 GiB.

    Returns:
        Path and size of the file, mean rank, the samples that were used, and warnings.

    Raises:
        RainError: an input cannot be used; no file is written then.
    """
    return pipeline.calibrate(read_config(str(config)), options or RunOptions(quiet=True))


def estimate(config: StrPath, options: RunOptions | None = None) -> Estimate:
    """Say what `calibrate` would need, from file headers and token counts; nothing is run.

    Args:
        config: path of the YAML.
        options: as for `calibrate`.

    Returns:
        Memory by part, disk and file size in bytes, and floating-point operations.

    Raises:
        RainError: an input cannot be used.
    """
    return pipeline.plan(read_config(str(config)), options or RunOptions(quiet=True))


def estimate_shape(shape: StrPath, options: RunOptions | None = None, **settings: Any) -> Estimate:
    """Say what a calibration of a published model would need, from its config.json alone.

    Args:
        shape: path of the config.json.
        options: as for `calibrate`.
        settings: as in the YAML's `rain:` section; by default the package's own sets. Their tokens
            are counted by their characters.

    Returns:
        Memory by part, disk and file size in bytes, floating-point operations, and what the
        file's size would be at other ranks.

    Raises:
        RainError: the config, a setting or a set cannot be used.
    """
    return plan_shape(str(shape), settings, options or RunOptions(quiet=True))


def merge(config: StrPath, out: StrPath, *arguments: str) -> Path:
    """Calibrate if the file is missing or was made from something else, then merge.

    Args:
        config: path of the YAML.
        out: the folder of the merged model; it is filled only when everything has succeeded.
        arguments: options as `mergekit-rain merge` takes them, such as `--cuda`.

    Returns:
        The folder.

    Raises:
        RainError: an input cannot be used; the folder is left as it was.
        click.UsageError: an argument is not known.
    """
    from rain_mergekit.commands.merge import merge as command  # noqa: PLC0415 - click's decorators

    command.main([str(config), str(out), "--quiet", *arguments], standalone_mode=False)
    return Path(out)


def verify(
    merged: StrPath,
    against: StrPath,
    reasoning_data: StrPath,
    *,
    samples: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    load: LoadOptions | None = None,
) -> VerificationResult:
    """Measure how far a merge moved the next-token distributions from the reasoning model's.

    Args:
        merged: folder or hub name of the merged model.
        against: folder or hub name of the reasoning model.
        reasoning_data: texts with thinking, JSON or JSONL.
        samples: how many of them, evenly spaced; None: all.
        device: where the layers run, one at a time.
        dtype: of the forward pass.
        load: caches, and whether code of the models may run.

    Returns:
        The divergence (KL, nats) by place with a verdict, by layer, and by distance from markers.

    Raises:
        RainError: a model or the texts cannot be used.
    """
    options = load or LoadOptions()
    reasoning, result = (open_plain(str(one), options) for one in (against, merged))
    chosen, _ = read_texts(reasoning, Texts(str(reasoning_data), samples))
    return measure_merge(reasoning, result, chosen, VerifyOptions(options, device, dtype))


def project(delta: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
    """Compute Δ (I - U Vᵀ), the task vector without its effect on the protected features (Eq. 8).

    Args:
        delta: Δ, (d_out, d_in), of any floating-point dtype, in which the products are computed.
        u: U, (d_in, r); it is converted to the dtype and device of `delta`, and so is V.
        v: V, (d_in, r); None: V = U, the orthogonal projection for an orthonormal U.

    Returns:
        A tensor of the shape, dtype and device of `delta`; `delta` itself where r is 0.
    """
    return Factors(u, u if v is None else v).project(delta)
