"""The merge methods that apply a calibration file, and which settings are for which of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergekit.common import ModelReference
from mergekit.config import InputModelDefinition

from rain_mergekit.config.method_names import AIM, RAIN, REGMEAN
from rain_mergekit.config.setting_types import READERS
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.errors import RainError

_PLAIN = ("calibration", "lambda"), ("role",)
# The parameters for all models, and those of each model.
PARAMETERS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    RAIN: _PLAIN,
    REGMEAN: _PLAIN,
    AIM: (("calibration", "lambda", "omega", "merge", "density", "shuffle"), ("role", "weight")),
}


def settings_for(method: str, settings: RainSettings, source: str) -> RainSettings:
    """The settings as the method reads them; RainError for one that it would ignore."""
    if method == RAIN and settings.preset is not None and settings.fit != "projection":
        raise RainError(
            f"{source}: rain: preset: {settings.preset} is a way to project, and fit: "
            f"{settings.fit} is another method; leave out one of the two"
        )
    defaults, reader = RainSettings.model_fields, settings.fit if method == RAIN else method
    given = [name for name in defaults if getattr(settings, name) != defaults[name].default]
    unread = [name for name in given if reader not in READERS.get(name, (reader,))]
    for name in unread:
        owner = REGMEAN if name == REGMEAN else RAIN
        if owner != method:
            raise RainError(
                f"{source}: rain.{name} is for merge_method: {owner}; leave it out for {method}"
            )
    if unread:
        raise RainError(
            f"{source}: rain: fit: {settings.fit} does not read {', '.join(unread)}; set the "
            "other fit (streams or projection), or leave that out"
        )
    if method == RAIN:
        return settings
    if method == REGMEAN and settings.rank_by not in ("response_energy", "full"):
        raise RainError(
            f"{source}: rain.rank_by: {settings.rank_by} is for merge_method: rain; regmean takes "
            "response_energy or full"
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
