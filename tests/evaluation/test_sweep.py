"""`sweep`, `report --merged`, and the card that `merge` writes: what needs models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import browser
import pytest
import yaml
from commands import Workplace, make_models, make_workplace, refused, run, succeed
from safetensors.torch import load_file

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.evaluation.sweep import split_numbers
from rain_mergekit.evaluation.weight_change import relative_weight_change
from rain_mergekit.models.loading import LoadOptions, open_checkpoint
from rain_mergekit.report.model_card import BEGIN


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("sweep")
    return make_workplace(folder / "place", make_models(folder / "models"), samples=4)


@pytest.fixture(scope="module")
def swept(place: Workplace) -> tuple[Path, str]:
    out = place.folder / "swept"
    data = place.folder / "reasoning.jsonl"
    strengths = ("0", "0.5", "1.5")
    said = succeed("sweep", place.yaml, "--lambda", *strengths, "-o", out, "--reasoning-data", data)
    return out, said


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("c --lambda 1 2 -o d", "c --lambda 1 --lambda 2 -o d"),
        ("--lambda 1 -0.5 c 3", "--lambda 1 --lambda -0.5 c 3"),
        ("--lambda=1 2 --samples 3", "--lambda 1 --lambda 2 --samples 3"),
        ("--lambda 0.5,1 c", "--lambda 0.5 --lambda 1 c"),
        ("--lambda 0.5, 1, -2 c", "--lambda 0.5 --lambda 1 --lambda -2 c"),
        ("--lambda=[0.5,1]", "--lambda 0.5 --lambda 1"),
        ("--lambda 1,x", "--lambda 1,x"),
        ("--lambda 1 --lambda 2", "--lambda 1 --lambda 2"),
        ("-o 3 4", "-o 3 4"),
    ],
)
def test_one_option_takes_several_numbers(given: str, read: str) -> None:
    assert split_numbers(given.split(), "--lambda") == read.split()


def test_sweep_merges_every_strength_from_one_calibration(
    place: Workplace, swept: tuple[Path, str]
) -> None:
    out, said = swept
    assert said.count("Calibrating on") == 1
    weights = load_file(place.model("reasoning") / "model.safetensors")
    zero = load_file(out / "lambda-0.0" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert zero[name].equal(weights[name].to(zero[name].dtype))
    config = yaml.safe_load((out / "lambda-0.5" / "mergekit_config.yml").read_text())
    assert config["parameters"]["lambda"] == 0.5
    assert config["rain"] == place.config["rain"]


def test_sweep_measures_every_strength(swept: tuple[Path, str]) -> None:
    out, said = swept
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    assert [row["strength"] for row in rows] == [0.0, 0.5, 1.5]
    drifts = [row["drift"]["rest"]["mean"] for row in rows]
    assert drifts == sorted(drifts)
    assert drifts[0] < 1e-3 < drifts[2]  # bfloat16 rounds even at 0
    lines = said.splitlines()
    assert lines[-5].split()[:2] == ["lambda", "L_think"]
    assert [line.split()[0] for line in lines[-4:-1]] == ["0", "0.5", "1.5"]


def test_sweep_is_the_merge_and_verify(place: Workplace, swept: tuple[Path, str]) -> None:
    """The same weights as `merge`, and the same number as `verify`."""
    whole = place.folder / "whole"
    succeed("merge", place.write(parameters={"lambda": 1.5}), whole)
    theirs = (whole / "model.safetensors").read_bytes()
    assert (swept[0] / "lambda-1.5" / "model.safetensors").read_bytes() == theirs
    data = place.folder / "reasoning.jsonl"
    outcome = run("verify", whole, "--against", place.model("reasoning"), "--reasoning-data", data)
    think = json.loads((swept[0] / "sweep.json").read_text())["rows"][2]["drift"]["think"]["mean"]
    assert f"L_think  {think:<10.3g}" in outcome.output
    card = (whole / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert card.count(BEGIN) == 1
    assert "| strength λ | `1.5` |" in card


def test_table_only(place: Workplace) -> None:
    out = place.folder / "table"
    said = succeed("sweep", place.yaml, "--lambda", 1, "-o", out, "--table-only", "--samples", 1)
    assert "up to date" in said
    assert "held-out ones tell more" in said
    assert [path.name for path in out.iterdir()] == ["sweep.json"]


def test_text_of_an_earlier_card_is_kept(place: Workplace) -> None:
    """What people wrote stays; mergekit's configuration block and our section are the new ones."""
    out, data = place.folder / "again", place.folder / "reasoning.jsonl"
    succeed("merge", place.write(parameters={"lambda": 0.5}), out)
    verify = ("verify", out, "--against", place.model("reasoning"), "--reasoning-data", data)
    assert f"Wrote it into {out}/README.md" in succeed(*verify, "--card", "--samples", 2)
    page = out / "README.md"
    text = page.read_text(encoding="utf-8")
    assert re.search(r"\| L_think [0-9.e-]+, in the thinking block [0-9.e-]+, elsewhere", text)
    assert "`reasoning.jsonl`, 2 samples, SHA-256 `" in text
    assert "Nothing to change" in succeed("card", out)
    page.write_text(text.replace("# again", "# My model\n\nMine."), encoding="utf-8")
    succeed("merge", place.write(parameters={"lambda": 0.25}), out)
    renewed = page.read_text(encoding="utf-8")
    assert "# My model\n\nMine." in renewed
    assert renewed.count("lambda: 0.25") == 1
    assert "lambda: 0.5" not in renewed
    assert "| strength λ | `0.25` |" in renewed
    assert renewed.count(BEGIN) == 1
    assert "L_think" not in renewed  # it was measured on other weights
    assert "Nothing to change" in succeed("card", out)


def test_card_of_what_is_no_merge_is_refused_before_measuring(place: Workplace) -> None:
    data = place.folder / "reasoning.jsonl"
    verify = ("verify", place.model("instruct"), "--against", place.model("reasoning"))
    said = refused(place.folder, *verify, "--reasoning-data", data, "--card")
    assert "cannot read the configuration" in said


def test_without_a_card(place: Workplace) -> None:
    out = place.folder / "bare"
    succeed("merge", place.yaml, out, "--no-write-model-card")
    assert not (out / "README.md").exists()


@pytest.mark.parametrize("strengths", [(), ("nan",), ("--lambda",), ("one",)])
def test_strengths_that_are_none(place: Workplace, strengths: tuple[str, ...]) -> None:
    given = ("--lambda", *strengths) if strengths else ()
    assert run("sweep", place.yaml, "-o", place.folder / "no", *given).code == 2


def test_sweep_does_not_write_over_a_model(place: Workplace) -> None:
    inside = place.folder / "lambda-1.0"
    place.model("instruct").rename(inside)
    models = [
        {**item, "model": item["model"].replace("instruct", "lambda-1.0")}
        for item in place.config["models"]
    ]
    try:
        config = place.write(models=models)
        said = refused(inside, "sweep", config, "--lambda", 1, "-o", place.folder)
    finally:
        inside.rename(place.model("instruct"))
        place.write()
    assert "is the instruct model itself" in said


def test_report_of_a_merge(place: Workplace, swept: tuple[Path, str]) -> None:
    file = CalibrationFile.open(place.calibration)
    options = LoadOptions()
    opened = [
        open_checkpoint(str(path), options)
        for path in (place.model("reasoning"), swept[0] / "lambda-1.5")
    ]
    before, after = (load_file(Path(one.path) / "model.safetensors") for one in opened)
    found = relative_weight_change(file, *opened)
    assert list(found) == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    name = "model.layers.0.self_attn.o_proj.weight"
    change = (after[name].double() - before[name].double()).norm() / before[name].double().norm()
    assert found["o_proj"][0] == pytest.approx(float(change), rel=1e-5)
    page = place.folder / "page.html"
    data = place.folder / "reasoning.jsonl"
    merged = ("--merged", swept[0] / "lambda-1.5")
    succeed("report", place.calibration, *merged, "--reasoning-data", data, "-o", page)
    text = page.read_text(encoding="utf-8")
    assert "How far the weights moved" in text
    assert "L_think: the markers" in text
    for title in ("around the open marker", "around the close marker", "of the features at think"):
        assert f"Drift {title}" in text
    assert "own texts" not in text
    assert "Attention heads" not in text  # none were measured
    browser.check([text], place.folder / "browser")


def test_report_takes_the_texts_of_the_calibration(
    place: Workplace, swept: tuple[Path, str], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    command = ("report", place.calibration, "--merged", swept[0] / "lambda-1.5", "-o", page)

    def drawn(*options: object) -> str:
        succeed(*command, "--no-task-vectors", *options)
        return page.read_text(encoding="utf-8")

    found = drawn("--samples", 2)
    assert "<p>2 samples (" in found
    assert "own texts: held-out ones tell more)" in found
    assert "not shown: switched off by --no-drift" in drawn("--no-drift")
    data, text = place.folder / "reasoning.jsonl", (place.folder / "reasoning.jsonl").read_text()
    data.write_text(text + "\n")
    assert "not shown: the texts of the calibration are not here" in drawn()
    data.write_text(text)


def test_report_of_something_else(place: Workplace, swept: tuple[Path, str]) -> None:
    merged = ("--merged", swept[0] / "lambda-1.5")
    arguments = ("report", place.calibration, *merged, "-o", place.folder / "no.html")
    other = refused(place.folder, *arguments, "--against", place.model("instruct"))
    assert "is not the reasoning model of" in other
    assert "model not found" in refused(place.folder, *arguments, "--against", "nowhere/at-all")
