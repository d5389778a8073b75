"""Mergekit configurations for a trio, with a strength left open."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROLES = ("reasoning", "instruct", "pretrained")
LINEAR = "proj.weight"  # in the names of rain's seven module kinds and of nothing else
Config = dict[str, Any]
Recipe = Callable[[Path, float], Config]


def _models(trio: Path, weights: Mapping[str, Mapping[str, Any]]) -> list[Config]:
    return [
        {"model": str(trio / role), "parameters": dict(found)} for role, found in weights.items()
    ]


def task_arithmetic(trio: Path, strength: float) -> Config:
    """θ_R + λ(θ_I - θ_B) on every tensor."""
    weights = {"instruct": {"weight": strength}, "pretrained": {"weight": -strength}}
    return _anchored("task_arithmetic", trio, weights)


def linear_task_arithmetic(trio: Path, strength: float) -> Config:
    """The same on the tensors that rain changes too, everything else from the reasoning model."""

    def only(value: float) -> Config:
        return {"weight": [{"filter": LINEAR, "value": value}, {"value": 0.0}]}

    weights = {"instruct": only(strength), "pretrained": only(-strength)}
    return _anchored("task_arithmetic", trio, weights)


def _anchored(method: str, trio: Path, weights: Mapping[str, Mapping[str, Any]]) -> Config:
    return {
        "merge_method": method,
        "base_model": str(trio / "reasoning"),
        "models": _models(trio, weights),
        "dtype": "bfloat16",
    }


def sparse(method: str, *, whole: bool) -> Recipe:
    """Both task vectors on the pretrained model, the instruct model's with weight λ.

    As in mergekit's examples half of each task vector is dropped and the weights are normalised;
    whole: fairer to the reasoning model, whose task vector is kept whole and at weight 1.
    """

    def recipe(trio: Path, strength: float) -> Config:
        extra = {"epsilon": 0.1} if method == "della" else {}
        weights = {
            "reasoning": {"weight": 1.0, "density": 1.0 if whole else 0.5, **extra},
            "instruct": {"weight": strength, "density": 0.5, **extra},
        }
        return {
            "merge_method": method,
            "base_model": str(trio / "pretrained"),
            "models": _models(trio, weights),
            "parameters": {"normalize": not whole},
            "dtype": "bfloat16",
        }

    return recipe


def slerp(trio: Path, strength: float) -> Config:
    """Between the reasoning (t = 0) and the instruct model (t = 1)."""
    return {
        "merge_method": "slerp",
        "base_model": str(trio / "reasoning"),
        "models": _models(trio, {"reasoning": {}, "instruct": {}}),
        "parameters": {"t": strength},
        "dtype": "bfloat16",
    }


def rain_config(
    trio: Path,
    calibration: Path,
    strength: float,
    settings: Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
) -> Config:
    """The configuration that both `mergekit-rain calibrate` and the merge read."""
    weights = {role: {"role": role} for role in ("instruct", "pretrained")}
    config = {**_anchored("rain", trio, weights), "dtype": dtype}
    config["parameters"] = {"calibration": str(calibration), "lambda": strength}
    if settings is not None:
        data = {
            f"{kind}_data": str(trio / f"{kind}.jsonl") for kind in ("reasoning", "instruction")
        }
        config["rain"] = {**data, "fit": "projection", **settings}
    return config


def rain_settings(projection: str, share: float, thinking: int, **more: Any) -> dict[str, Any]:
    """Settings of one calibration; what is not given stays at rain's defaults."""
    return {
        "projection": projection,
        "rank_share": share,
        "protect_thinking": thinking,
        "coefficients": "off",
        "reading_share": 0.0,
        **more,
    }
