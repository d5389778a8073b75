"""Presets: the same file as with their settings written out, and what `inspect` says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import succeed
from tiny import Tiny

from rain_mergekit.calibration.up_to_date import compare
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.summary import summarise
from rain_mergekit.config.presets import PRESETS
from rain_mergekit.errors import RainError
from rain_mergekit.models.loading import LoadOptions
from rain_mergekit.report.model_card import section


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny.make(tmp_path_factory.mktemp("presets"), "qwen2")


def made(tiny: Tiny, calibration: str, **settings: Any) -> CalibrationFile:
    one = tiny.using(calibration, **settings)
    one.calibrate()
    return CalibrationFile.open(one.path)


@pytest.mark.parametrize("name", list(PRESETS))
def test_the_file_is_that_of_the_settings(tiny: Tiny, name: str) -> None:
    short = made(tiny, f"{name}.rain.safetensors", preset=name)
    long = made(tiny, f"{name}-long.rain.safetensors", **PRESETS[name].settings)
    assert short.keys() == long.keys()
    assert all(torch.equal(short.tensor(key), long.tensor(key)) for key in long.keys())  # noqa: SIM118
    assert short.header["settings"] == {**long.header["settings"], "preset": name}
    # a preset is only a name: neither way to write it makes the other's file out of date
    written = tiny.using(f"{name}.rain.safetensors", **PRESETS[name].settings)
    assert compare(written.config(), LoadOptions()).current
    other = tiny.using(f"{name}.rain.safetensors", preset=name, rho=0.75)
    found = compare(other.config(), LoadOptions()).differences
    assert any("rain.rho is 0.75" in text for text in found)


def test_inspect_tells_what_stands_beside_it_and_what_it_is_not(tiny: Tiny) -> None:
    beside = {"coefficients": "off", "rank_share": 0.8}
    file = made(tiny, "beside.rain.safetensors", preset="paper", **beside)
    path = file.path
    said = succeed("inspect", path)
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert 'preset "paper"' in lines
    assert 'coefficients "off", beside the preset' in lines  # the default, and not the preset's
    assert "rank_share 0.8, beside the preset" in lines
    assert 'projection "orthogonal"' in lines
    assert "Where preset: paper is not what it is named after" in lines
    assert all(text in " ".join(said.split()) for text in PRESETS["paper"].limits)
    found = json.loads(succeed("inspect", path, "--json"))["preset"]
    assert (found["name"], found["beside"]) == ("paper", ["coefficients", "rank_share"])
    card = section(tiny.config(), summarise(file))
    assert "| preset | `paper`, but `coefficients`, `rank_share` given beside it |" in card
    page = Path(path).with_suffix(".html")
    succeed("report", path, "-o", page)
    assert PRESETS["paper"].limits[1] in page.read_text(encoding="utf-8")


def test_a_preset_is_for_the_projection_of_rain(tiny: Tiny) -> None:
    with pytest.raises(RainError, match="preset: paper is a way to project, and fit: streams is"):
        tiny.using(preset="paper", fit="streams").config()
    with pytest.raises(RainError, match=r"rain\.preset is for merge_method: rain; leave it out"):
        tiny.using(preset="paper").config(merge_method="regmean")
    one = tiny.content()["models"][:1]
    section = {**tiny.content()["rain"], "preset": "published"}
    del section["fit"]
    with pytest.raises(RainError, match="expected exactly two besides base_model"):
        tiny.config(models=one, rain=section)
