"""Merges whose models are listed by slices of layers, and what mergekit-multi makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from commands import Workplace, make_models, make_workplace, refused, succeed
from mergekit.scripts.multimerge import main as multimerge


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Calibrated, and merged with `models:`."""
    folder = tmp_path_factory.mktemp("slices")
    place = make_workplace(folder / "place", make_models(folder / "models"), samples=4)
    succeed("merge", place.yaml, place.folder / "out")
    return place


def sliced(place: Workplace, *layers: int) -> dict[str, Any]:
    """Without `models:`; one slice of layers."""
    models = [*place.config["models"], {"model": place.config["base_model"]}]
    sources = [{**model, "layer_range": list(layers)} for model in models]
    return {**place.config, "models": None, "slices": [{"sources": sources}]}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_slices_that_move_no_layer(place: Workplace, tmp_path: Path) -> None:
    """The calibration is that of the same models, and the result is the same."""
    out, config = tmp_path / "out", tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(sliced(place, 0, 1)))
    assert "is up to date" in succeed("merge", config, out)
    assert weights(out) == weights(place.folder / "out")
    assert (out / "config.json").read_text() == (place.folder / "out/config.json").read_text()
    succeed("card", out)
    assert "Nothing to change" in succeed("finish", out)


def test_slices_of_other_models(place: Workplace, tmp_path: Path) -> None:
    """Layers that are cut off or moved are refused by all, before any work."""
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(sliced(place, 0, 2)))
    for command in (("calibrate", config), ("merge", config, tmp_path / "out")):
        assert "slices: they have 2 layers, and the reasoning" in refused(tmp_path, *command)
    config.write_text(yaml.safe_dump(sliced(place, 1, 2)))
    for command in (("calibrate", config), ("merge", config, tmp_path / "out")):
        assert "expected one that begins at 0" in refused(tmp_path, *command)


def test_a_result_of_mergekit_multi(place: Workplace, tmp_path: Path) -> None:
    """It writes slices and leaves our section out; what follows a merge takes it all the same."""
    path = tmp_path / "multi.yml"
    path.write_text(yaml.safe_dump({**place.config, "name": "first"}))
    done = CliRunner().invoke(multimerge, [str(path), "-I", str(tmp_path), "--quiet"])
    assert done.exit_code == 0, done.output
    out = tmp_path / "first"
    written = yaml.safe_load((out / "mergekit_config.yml").read_text())
    assert "modules" in written
    assert "rain" not in written
    assert f"Finished {out}" in succeed("finish", out)
    assert weights(out) == weights(place.folder / "out")
    said = succeed("card", out)
    assert "Wrote" in said
    assert "| strength λ | `1.0` |" in (out / "README.md").read_text()
    data = place.folder / "reasoning.jsonl"
    options = ("--against", place.model("reasoning"), "--reasoning-data", data, "--samples", 2)
    of_both = [succeed("verify", folder, *options) for folder in (out, place.folder / "out")]
    assert of_both[0].replace(str(out), "") == of_both[1].replace(str(place.folder / "out"), "")
    assert "without it L_think is" in of_both[0]
    assert succeed("verify", out, *options[2:]) == of_both[0]  # its configuration says against what


def test_results_of_other_methods(place: Workplace, tmp_path: Path) -> None:
    """mergekit-multi lists slices there too; models and parameters are told all the same."""
    own, (instruct, pretrained) = str(place.model("reasoning")), place.config["models"]
    models = [
        {"model": instruct["model"], "parameters": {"weight": 0.25}},
        {"model": pretrained["model"], "parameters": {"weight": [0.5, 0.75]}},
    ]
    methods = {
        "linear": {"models": [{"model": own, "parameters": {"weight": 1}}, *models]},
        "ties": {"base_model": own, "models": models, "parameters": {"density": 0.5}},
    }
    texts = [
        yaml.safe_dump({"name": f"by-{name}", "merge_method": name, "dtype": "bfloat16", **rest})
        for name, rest in methods.items()
    ]
    path = tmp_path / "multi.yml"
    path.write_text("---\n".join(texts))
    done = CliRunner().invoke(multimerge, [str(path), "-I", str(tmp_path), "--quiet"])
    assert done.exit_code == 0, done.output
    for name in methods:
        assert "Wrote" in succeed("card", tmp_path / f"by-{name}")
        text = (tmp_path / f"by-{name}" / "README.md").read_text()
        assert '`instruct`, `{"weight": 0.25}` |' in text, text
        assert '`pretrained`, `{"weight": [0.5, 0.75]}` |' in text
    assert "| `density` | `0.5` |" in text
    assert "| base | `reasoning` |" in text
    message = refused(tmp_path, "verify", tmp_path / "by-ties")
    assert "merge_method is 'ties'" in message
    assert "or name the reasoning model with --against" in message
