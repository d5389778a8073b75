"""Recipes of the methods that rain is compared with: mergekit's own, and the companions."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from testbed.board.recipes import Config, Recipe

# trio, calibration file, strength
CalibratedRecipe = Callable[[Path, Path, float], Config]
DATA = {f"{kind}_data": f"{kind}.jsonl" for kind in ("reasoning", "instruction")}


def merge(
    method: str,
    trio: Path,
    base: str | None,
    models: Mapping[str, Mapping[str, Any]],
    **parameters: Any,
) -> Config:
    """A configuration: models by role with their parameters, and those of all."""
    found: Config = {
        "merge_method": method,
        "models": [
            {"model": str(trio / role), "parameters": dict(own)} for role, own in models.items()
        ],
    }
    if base is not None:
        found["base_model"] = str(trio / base)
    return {**found, "parameters": parameters} if parameters else found


def linear(trio: Path, strength: float) -> Config:
    """Model interpolation: (1 - s) W_R + s W_I."""
    models = {"reasoning": {"weight": 1 - strength}, "instruct": {"weight": strength}}
    return merge("linear", trio, None, models)


def task_arithmetic_of_both(trio: Path, strength: float) -> Config:
    """W_B + s (W_R - W_B) + s (W_I - W_B)."""
    models = {role: {"weight": strength} for role in ("reasoning", "instruct")}
    return merge("task_arithmetic", trio, "pretrained", models)


def sparse(method: str, density: float) -> Recipe:
    """Both task vectors on the pretrained model, the instruct model's with weight s.

    Everything but the density is the method's own default.
    """

    def recipe(trio: Path, strength: float) -> Config:
        models = {
            role: {"weight": weight, "density": density}
            for role, weight in (("reasoning", 1.0), ("instruct", strength))
        }
        return merge(method, trio, "pretrained", models)

    return recipe


def nuslerp(base: str | None) -> Recipe:
    """The same on the weights, or on the task vectors of `base`."""

    def recipe(trio: Path, strength: float) -> Config:
        models = {"reasoning": {"weight": 1 - strength}, "instruct": {"weight": strength}}
        return merge("nuslerp", trio, base, models)

    return recipe


def nearswap(trio: Path, strength: float) -> Config:
    """The instruct model's numbers where they are within s of the reasoning model's."""
    return merge("nearswap", trio, "reasoning", {"reasoning": {}, "instruct": {}}, t=strength)


def companion(method: str, **parameters: Any) -> Recipe:
    """A data-free companion at its own defaults; s is its lambda."""

    def recipe(trio: Path, strength: float) -> Config:
        models: Mapping[str, Any] = {"reasoning": {}, "instruct": {}}
        return merge(method, trio, "pretrained", models, **parameters, **{"lambda": strength})

    return recipe


def regmean(*, anchored: bool) -> CalibratedRecipe:
    """W_R + s Δ G_I (G_I + G_R)⁻¹; anchored: of W_I - W_B, else of W_I - W_R."""

    def recipe(trio: Path, calibration: Path, strength: float) -> Config:
        roles = ("instruct", "pretrained") if anchored else ("instruct",)
        models = {role: {"role": role} for role in roles}
        own = {"calibration": str(calibration), "lambda": strength}
        return merge("regmean", trio, "reasoning", models, **own)

    return recipe


def aim(**control: str) -> CalibratedRecipe:
    """Task arithmetic on the pretrained model, relaxed at busy channels."""

    def recipe(trio: Path, calibration: Path, strength: float) -> Config:
        models = {
            "reasoning": {"role": "reasoning", "weight": 1.0},
            "instruct": {"role": "instruct", "weight": strength},
        }
        return merge("aim", trio, "pretrained", models, calibration=str(calibration), **control)

    return recipe


def with_section(config: Config, trio: Path, settings: Mapping[str, Any]) -> Config:
    """With the section that `mergekit-rain calibrate` reads."""
    data = {name: str(trio / file) for name, file in DATA.items()}
    return {**config, "rain": {**data, **settings}}
