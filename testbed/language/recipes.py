"""The rows of the board: mergekit configurations with a strength left open."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from testbed.language.sets import Samples

Config = dict[str, Any]
Recipe = Callable[[Path, float], Config]
BETWEEN = (0.3, 0.5, 0.7)  # the instruct model's share
WHOLLY = 1.0  # nothing of the reasoning model is left
ADDED = (0.3, 0.5, 0.7)  # its task vector's factor
FLOAT = {"dtype": "float32", "out_dtype": "bfloat16"}  # one rounding, at the end


def slug(name: str) -> str:
    """A row's name as that of a file."""
    return "".join(c if c.isalnum() or c == "." else "-" for c in name.lower())


@dataclass(frozen=True)
class Row:
    """A row: its strengths are tried on validation prompts, the best one is judged."""

    name: str
    strengths: tuple[float, ...]
    recipe: Recipe
    rain: Mapping[str, Any] = field(default_factory=dict)
    most: float = 3.0  # the grid goes no further
    samples: Samples = field(default_factory=Samples)

    @property
    def slug(self) -> str:
        return slug(self.name)


def _models(trio: Path, parameters: Mapping[str, Mapping[str, Any]]) -> list[Config]:
    return [{"model": str(trio / role), "parameters": dict(p)} for role, p in parameters.items()]


def _merge(method: str, trio: Path, base: str | None, models: Config, **parameters: Any) -> Config:
    made = {"merge_method": method, "models": _models(trio, models), **FLOAT}
    if base:
        made["base_model"] = str(trio / base)
    return {**made, "parameters": parameters} if parameters else made


def task_arithmetic(trio: Path, strength: float) -> Config:
    """θ_R + λ(θ_I - θ_B) on every tensor."""
    models = {"instruct": {"weight": strength}, "pretrained": {"weight": -strength}}
    return _merge("task_arithmetic", trio, "reasoning", models)


def masked(folder: str) -> Recipe:
    """Task arithmetic with a model, within the trio's folder, that has a part of θ_I alone."""

    def recipe(trio: Path, strength: float) -> Config:
        models = {folder: {"weight": strength}, "pretrained": {"weight": -strength}}
        return _merge("task_arithmetic", trio, "reasoning", models)

    return recipe


def linear(trio: Path, share: float) -> Config:
    models = {"reasoning": {"weight": 1 - share}, "instruct": {"weight": share}}
    return _merge("linear", trio, None, models)


def slerp(trio: Path, share: float) -> Config:
    return _merge("slerp", trio, "reasoning", {"reasoning": {}, "instruct": {}}, t=share)


def nuslerp(trio: Path, share: float) -> Config:
    """On the task vectors."""
    models = {"reasoning": {"weight": 1 - share}, "instruct": {"weight": share}}
    return _merge("nuslerp", trio, "pretrained", models)


def sparse(method: str, density: float) -> Recipe:
    """Both task vectors thinned and added to the pretrained model, as in mergekit's examples."""

    def recipe(trio: Path, strength: float) -> Config:
        models = {
            "reasoning": {"weight": 1.0, "density": density},
            "instruct": {"weight": strength, "density": density},
        }
        return _merge(method, trio, "pretrained", models, normalize=True)

    return recipe


def rivals() -> list[Row]:
    """Merge methods that mergekit has."""
    return [
        Row("task_arithmetic", ADDED, task_arithmetic),
        Row("linear", BETWEEN, linear, most=WHOLLY),
        Row("ties 0.2", ADDED, sparse("ties", 0.2)),
        Row("ties 0.5", ADDED, sparse("ties", 0.5)),
        Row("slerp", BETWEEN, slerp, most=WHOLLY),
        Row("dare_ties 0.5", ADDED, sparse("dare_ties", 0.5)),
        Row("nuslerp", BETWEEN, nuslerp, most=WHOLLY),
    ]


def _added(method: str, **parameters: Any) -> Recipe:
    """Both task vectors merged into the pretrained model, by a method with one factor for all."""

    def recipe(trio: Path, strength: float) -> Config:
        models: Mapping[str, Mapping[str, Any]] = {"reasoning": {}, "instruct": {}}
        return _merge(method, trio, "pretrained", models, **parameters, **{"lambda": strength})

    return recipe


def regmean(trio: Path, strength: float) -> Config:
    """Of the reasoning and the instruct model alone."""
    models = {"instruct": {"role": "instruct"}}
    return _merge("regmean", trio, "reasoning", models, **{"lambda": strength})


def aim(**control: str) -> Recipe:
    """On task arithmetic, with the omega of the paper's tables."""

    def recipe(trio: Path, strength: float) -> Config:
        models = {
            "reasoning": {"role": "reasoning", "weight": 1.0},
            "instruct": {"role": "instruct", "weight": strength},
        }
        said = {"omega": 0.4, "merge": "task_arithmetic", **control}
        return _merge("aim", trio, "pretrained", models, **said)

    return recipe


def companions() -> list[Row]:
    """Methods that this package registers beside rain, with the settings of their pages."""
    calibrated = {"": None}  # on the same sets as rain, with defaults
    merged = {"regmean": {"features": "merged"}}
    return [
        Row("regmean", BETWEEN, regmean, rain=calibrated),
        Row("regmean, merged features", BETWEEN, regmean, rain=merged),
        Row("aim", ADDED, aim(), rain=calibrated),
        Row("aim, shuffled channels", ADDED, aim(shuffle="channels"), rain=calibrated),
        Row("opcm", ADDED, _added("opcm", alpha=0.5)),
        Row("pcb", ADDED, _added("pcb", density=0.6)),
        Row("wudi", ADDED, _added("wudi")),
    ]


def rain_rows(path: Path) -> list[Row]:
    """Rows of a YAML list of `{name, strengths, models, rain, parameters, samples}`.

    `models` names the roles besides the reasoning model (instruct and pretrained unless given),
    `samples` how many of each kind the sets hold.
    The board adds the trio's two calibration sets and the path of the calibration file.
    """
    return [_rain_row(entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]


def _rain_row(entry: Mapping[str, Any]) -> Row:
    roles = entry.get("models", ["instruct", "pretrained"])

    def recipe(trio: Path, strength: float) -> Config:
        models = {role: {"role": role} for role in roles}
        parameters = {**entry.get("parameters", {}), "lambda": strength}
        return _merge("rain", trio, "reasoning", models, **parameters)

    strengths = tuple(float(s) for s in entry.get("strengths", [1.0]))
    return Row(
        str(entry["name"]),
        strengths,
        recipe,
        rain=entry.get("rain", {}) or {"": None},
        samples=Samples(**entry.get("samples", {})),
    )
