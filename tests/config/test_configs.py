"""The shipped configurations are ones that our reader and mergekit accept, and are complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from mergekit.config import MergeConfiguration

from rain_mergekit.config.merge_config import read_config
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.text import calibration_sets
from rain_mergekit.text.markers import Markers

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yml"))
PAIRS = {
    "qwen2.5-1.5b-r1-distill": "Qwen2.5-1.5B",
    "qwen2.5-7b-r1-distill": "Qwen2.5-7B",
    "qwen2.5-14b-r1-distill": "Qwen2.5-14B",
    "qwen2.5-32b-r1-distill": "Qwen2.5-32B",
    "llama3.1-8b-r1-distill": "Llama-3.1-8B",
}


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def test_every_configuration_is_here() -> None:
    assert {path.stem for path in CONFIGS} == {*PAIRS, "reference"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_is_read(path: Path) -> None:
    config = read_config(path)
    assert config.instruct != config.reasoning
    assert str(config.calibration).endswith(".rain.safetensors")
    merge = MergeConfiguration.model_validate(load(path))
    assert merge.dtype == "bfloat16"
    # The paths are meant for a folder in which `mergekit-rain examples` was run.
    assert calibration_sets.read_reasoning(ROOT / config.settings.reasoning_data)
    assert config.settings.instruction_data is not None
    assert calibration_sets.read_instruction(ROOT / config.settings.instruction_data)


@pytest.mark.parametrize("name", PAIRS)
def test_published_pairs(name: str) -> None:
    config = read_config(ROOT / "configs" / f"{name}.yml")
    size = PAIRS[name].rpartition("-")[2]
    assert str(config.instruct).endswith(f"/{PAIRS[name]}-Instruct")
    assert config.pretrained == config.reasoning  # two models are enough
    family = "Llama" if "llama" in name else "Qwen"
    assert str(config.reasoning) == f"deepseek-ai/DeepSeek-R1-Distill-{family}-{size}"
    assert config.settings == settings_with_defaults(config.settings)


def test_calibration_files_do_not_collide() -> None:
    pairs = [read_config(ROOT / "configs" / f"{name}.yml").calibration for name in PAIRS]
    assert len(set(pairs)) == len(pairs)


def test_reference_shows_every_setting_with_its_default() -> None:
    path = ROOT / "configs" / "reference.yml"
    shown = load(path)["rain"]
    defaults = settings_with_defaults(read_config(path).settings).model_dump(mode="json")
    for name in ("coefficients", "lm_head"):  # YAML reads a bare off as false
        shown[name] = "off" if shown[name] is False else shown[name]
    assert list(shown) == list(RainSettings.model_fields)  # the same order, too
    assert shown == defaults


def test_every_setting_of_the_reference_is_explained() -> None:
    text = (ROOT / "configs" / "reference.yml").read_text(encoding="utf-8")
    section = text[text.index("\nrain:\n") :]
    blocks = re.split(r"\n\s*\n", section)
    assert not [block for block in blocks if "#" not in block]


def settings_with_defaults(settings: RainSettings) -> RainSettings:
    """Everything at its default but the data, which have none."""
    return RainSettings(
        reasoning_data=settings.reasoning_data, instruction_data=settings.instruction_data
    )


SHORTER = sorted((ROOT / "configs" / "long-to-short").glob("*.yml"))
# Drop rate k and factor of TIES at each size, from the paper's table 7.
PUBLISHED_TIES = {"1.5b": (0.8, 1.0), "7b": (0.8, 1.0), "14b": (0.2, 0.5), "32b": (0.25, 0.55)}


def test_long_to_short_has_each_size_and_method() -> None:
    wanted = {f"{size}-{name}" for size in PUBLISHED_TIES for name in ("task-arithmetic", "ties")}
    assert {path.stem for path in SHORTER} == wanted


@pytest.mark.parametrize("path", SHORTER, ids=lambda path: path.stem)
def test_long_to_short_is_the_published_recipe(path: Path) -> None:
    merge = MergeConfiguration.model_validate(load(path))
    size, _, name = path.stem.partition("-")
    assert merge.merge_method == name.replace("-", "_")
    assert merge.models is not None
    assert merge.parameters is not None
    (only,) = merge.models
    assert str(only.model) == f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{size.upper()}"
    math = "Math-" if size in ("1.5b", "7b") else ""
    assert str(merge.base_model) == f"Qwen/Qwen2.5-{math}{size.upper()}"
    drop, factor = PUBLISHED_TIES[size]
    if name == "ties":
        assert merge.parameters["density"] == pytest.approx(1 - drop)
        assert merge.parameters["lambda"] == factor
    else:
        assert merge.parameters["lambda"] == 0.7


def test_the_other_direction_keeps_calls_and_shares_a_tokenizer() -> None:
    (path,) = (ROOT / "configs" / "other-direction").glob("*.yml")
    config = read_config(path)
    assert config.settings.blocks == "optional"
    assert config.settings.marker_texts == Markers("<tool_call>", "</tool_call>", optional=True)
    families = {str(model).partition("-")[0] for model in (config.reasoning, config.instruct)}
    assert families == {"Qwen/Qwen3"}
    assert MergeConfiguration.model_validate(load(path)).dtype == "bfloat16"
