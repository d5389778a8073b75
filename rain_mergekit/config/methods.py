"""The merge methods that apply a calibration file, and which settings are for which of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergekit.common import ModelReference
from mergekit.config import InputModelDefinition

from rain_mergekit.config.method_names import AIM, RAIN, REGMEAN
from rain_mergekit.config.setting_types import ONLY_FOR
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.errors import RainError

_PLAIN = ("calibration", "lambda"), ("role",)
# The parameters for all models, and those of each model.
PARAMETERS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    RAIN: _PLAIN,
    REGMEAN: _PLAIN,
    AIM: (("calibration", "lambda", "omega", "merge", "density", "shuffle"), ("role", "weight")),
}
# Settings that choose how rain protects; regmean leaves none of that open.
_OF_RAIN = ("fit", "projection", "ridge", "lm_head", "coefficients")


def settings_for(method: str, settings: RainSettings, source: str) -> RainSettings:
    """The settings as the method reads them; RainError for one that it would ignore."""
    defaults = RainSettings.model_fields
    given = [n for n in defaults if getattr(settings, n) != defaults[n].default]
    if method == RAIN:
        if unread := [n for n in given if ONLY_FOR.get(n, settings.fit) != settings.fit]:
            raise RainError(
                f"{source}: rain: fit: {settings.fit} does not read {', '.join(unread)}; set the "
                "other fit (streams or projection), or leave that out"
            )
        return settings
    for name in given:
        if name in _OF_RAIN:
            raise RainError(
                f"{source}: rain.{name} is for merge_method: rain; leave it out for {method}"
            )
    # They collect a site's inputs as the projection does.
    return settings.model_copy(update={"fit": "projection"})


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
