"""The merge methods that apply a calibration file, and which settings are for which of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergekit.common import ModelReference
from mergekit.config import InputModelDefinition

from rain_mergekit.config.settings import RainSettings
from rain_mergekit.errors import RainError

RAIN, REGMEAN, AIM = "rain", "regmean", "aim"
CALIBRATED = (RAIN, REGMEAN, AIM)
_PLAIN = ("calibration", "lambda"), ("role",)
# The parameters for all models, and those of each model.
PARAMETERS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    RAIN: _PLAIN,
    REGMEAN: _PLAIN,
    AIM: (("calibration", "lambda", "omega", "merge", "density", "shuffle"), ("role", "weight")),
}
# Settings that choose how rain protects; regmean leaves none of that open.
_OF_RAIN = ("fit", "projection", "ridge", "lm_head", "coefficients")


def check_settings(method: str, settings: RainSettings, source: str) -> None:
    """RainError for a setting that the method would ignore."""
    if method == RAIN:
        return
    defaults = RainSettings.model_fields
    for name in _OF_RAIN:
        if getattr(settings, name) != defaults[name].default:
            raise RainError(
                f"{source}: rain.{name} is for merge_method: rain; leave it out for {method}"
            )


def aim_models(
    others: Sequence[InputModelDefinition], base: ModelReference, source: str
) -> dict[str, ModelReference]:
    """The models by role for AIM, whose base model is the pretrained one; RainError if unclear."""
    found = {(item.parameters or {}).get("role"): item.model for item in others}
    if len(others) != 2 or set(found) != {"reasoning", "instruct"}:
        raise RainError(
            f"{source}: models: merge_method: aim needs two besides base_model, one with `role: "
            f"reasoning`, whose texts they are, and one with `role: instruct`; found {len(others)}"
        )
    return {"pretrained": base, **{str(role): model for role, model in found.items()}}
