"""Whether the base model of a merge is the one that the calibration was made for."""

from __future__ import annotations

from collections.abc import Hashable

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.errors import RainError
from rain_mergekit.merge_method.cache import Recent
from rain_mergekit.models.fingerprint import fingerprint

_CHECKED: Recent[None] = Recent(8)


def check_base(calibration: CalibrationFile, model: Hashable) -> None:
    """Compare with the pretrained model's recorded fingerprint; RainError where it differs.

    Once for each file and model. Models that mergekit has not opened cannot be checked.
    """
    _CHECKED.get((calibration, model), lambda: _check(calibration, model))


def _check(calibration: CalibrationFile, model: Hashable) -> None:
    if not isinstance(model, ModelReference) or model not in LoaderCache.loaders:
        return
    record = calibration.models["pretrained"]
    folder = LoaderCache().get(model).index.base_path
    different = record.differences(fingerprint(folder)) if record.fingerprint else []
    if different:
        raise RainError(
            f"calibration file {calibration.path!r} was made for another base model: it records "
            f"{record.reference}, and {model} differs in {', '.join(different)}; set base_model to "
            "the recorded model, or calibrate again"
        )
