"""`inspect` and `report`: what they say of a file, and that a page is safe, whole and readable."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import browser
import calibrations
import pytest
import torch
from browser import Page
from commands import refused, run, succeed

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.site_names import locate
from rain_mergekit.calibration_file.summary import changed_settings, summarise
from rain_mergekit.calibration_file.writer import write_calibration
from rain_mergekit.report import figures, spectra
from rain_mergekit.report.page import render
from rain_mergekit.report.text_heatmap import BLOCKS, DIGITS, band_names, heat_rows

HOSTILE = (
    "</code><script>alert(1)</script><img src='/stolen' onerror=alert(1)>$\\frac{ \x1b[31m\u4f60"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrations.write(tmp_path_factory.mktemp("file") / "some.rain.safetensors")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Names that try everything: markup, formulas, escape sequences, other scripts."""
    folder = tmp_path_factory.mktemp("hostile")
    header = calibrations.header(1, references={"reasoning": HOSTILE})
    header["created_by"] = HOSTILE
    header["data"]["reasoning"].update(path=HOSTILE, sha256=["no", "text"], total="many")
    header["settings"] = {HOSTILE: HOSTILE, "rank_by": {"no": "text"}, "alpha_min": True}
    header["warnings"] = [HOSTILE]
    header["sites"] = {
        HOSTILE + str(i): {"width": 2, "rank": 1, "u": "u", "v": None, "spectrum": "s"}
        for i in range(2)
    }
    header["sites"][HOSTILE + "0"]["response_energy"] = ["no", "key"]
    header["layers"] = [{"name": HOSTILE, "stats": {"alpha": "a", "alignment": "u"}}]
    stored = {
        "u": torch.eye(2)[:, :1].contiguous(),
        "s": torch.tensor([2.0, 1.0]),
        "a": torch.tensor([math.nan, 0.5, 1.5]),
    }
    file = folder / "<b>&amp;.safetensors"
    write_calibration(file, header, stored)
    return file


@pytest.fixture(scope="module")
def page(path: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "page.html"
    assert f"Wrote {out}" in succeed("report", path, "-o", out)
    text = out.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n")
    return text


@pytest.fixture(scope="module")
def hostile_page(hostile: Path) -> str:
    return render(CalibrationFile.open(hostile))


MODULES = ("q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj")

# The numbers


def test_summary_is_what_the_file_holds(path: Path) -> None:
    summary = summarise(CalibrationFile.open(path))
    assert summary.bytes == path.stat().st_size
    assert [kind.modules for kind in summary.kinds] == [
        ("q_proj", "k_proj", "v_proj"),
        ("down_proj",),
    ]
    for kind in summary.kinds:
        assert (kind.sites, kind.capped, kind.rank.mean) == (12, 1, calibrations.RANK)
        assert kind.kept is not None
        assert (kind.kept.low, kind.kept.high) == (0.9, pytest.approx(0.911))
    assert [site.layer for site in summary.sites[::2]] == list(range(12))  # not 0, 1, 10, 11, 2
    assert summary.layers[3].heads["alpha"] == pytest.approx((0.33, 0.63, 0.93, 1.23))
    assert summary.changed == {"max_rank": calibrations.RANK}


def test_settings_that_differ() -> None:
    known = {"reasoning_data": "r", "instruction_data": "i", "window": 5, "rank_share": 0.9}
    assert changed_settings({**known, "markers": "auto", "newer": None}) == {
        "rank_share": 0.9,
        "newer": None,
    }


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.3.mlp.up_proj", 3, "mlp.up_proj"),
        ("model.layers.12.mlp.experts.7.w2", 12, "mlp.experts.*.w2"),
        ("layer0.attention", 0, "attention"),
        ("7", 7, "7"),
        ("odd", None, "odd"),
        ("", None, ""),
    ],
)
def test_layer_and_kind_of_a_name(name: str, layer: int | None, kind: str) -> None:
    assert locate(name) == (layer, kind)


def test_spectrum_marks_what_the_rule_protects(path: Path) -> None:
    file = CalibrationFile.open(path)
    site = summarise(file).sites[0]
    by_response = spectra.singular(file, site, by_response=True)
    assert by_response is not None
    # Responses are the energies moved by one place: largest at direction 2, then 3, 4.
    assert [x for x, p in zip(by_response.x, by_response.protected, strict=True) if p] == [2, 3, 4]
    assert by_response.cut is None
    by_energy = spectra.singular(file, site, by_response=False)
    assert by_energy is not None
    assert by_energy.values[:2] == pytest.approx((1.0, 10 ** (-4 / 11)), rel=1e-5)
    assert by_energy.cut == (3, pytest.approx(10 ** (-8 / 11), rel=1e-5))
    response = spectra.response(file, site, by_response=True)
    assert response is not None
    assert response.protected[:4] == (True, True, True, False)


def test_long_spectra_are_thinned_and_keep_their_cut(tmp_path: Path) -> None:
    header = calibrations.header(0)
    header["sites"] = {"s.0": {"width": 5000, "rank": 2, "u": "u", "v": None, "spectrum": "s"}}
    stored = {"u": torch.zeros(5000, 2), "s": torch.arange(5000.0, 0, -1)}
    write_calibration(tmp_path / "long", header, stored)
    file = CalibrationFile.open(tmp_path / "long")
    curve = spectra.singular(file, summarise(file).sites[0], by_response=False)
    assert curve is not None
    assert len(curve.x) < 200
    assert {1, 2, 5000} <= set(curve.x)
    assert curve.cut is not None


def test_heat_map_in_characters() -> None:
    columns = [[0.0, 1.0], [0.5, math.nan], [2.0]]
    rows = heat_rows(columns, 0.0, 1.0, BLOCKS)
    assert [text for text, _ in rows] == ["▁▅█", "█··"]
    assert [text for text, _ in heat_rows(columns, 0.0, 1.0, DIGITS)] == ["059", "9--"]
    assert heat_rows([[3.0]], 3.0, 3.0, DIGITS)[0][0] == "5"
    assert heat_rows([], 0.0, 1.0, DIGITS) == []
    large = heat_rows([[float(h) for h in range(64)]] * 100, 0.0, 63.0, DIGITS)
    assert [len(text) for text, _ in large] == [64] * 8
    assert large[0][0][0] == "0"
    assert large[-1][0][-1] == "9"
    assert band_names(64)[1] == "heads 8-15"


# inspect


def test_inspect_says_everything_on_one_screen(path: Path) -> None:
    said = succeed("inspect", path)
    for text in (
        "org/reasoning",
        "8 of 9 samples, 80 positions, sha256 abababababab\n             reasoning.jsonl\n",
        "max_rank  3",
        "q_proj k_proj v_proj    12    12  3.0 (3-3)",
        "0.905 (0.900)",
        "head 0 ",
    ):
        assert text in said
    assert len(said.splitlines()) < 30
    assert max(map(len, said.splitlines()[1:])) <= 80  # the first is the file's own path
    assert said.isascii()  # nobody is watching: no blocks, no colours


@pytest.mark.parametrize(("layers", "heads"), [(32, 32), (64, 64), (126, 128)])
def test_inspect_of_a_large_model_fits_a_screen(
    layers: int, heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = {f"{modules.split()[0]}": tuple(modules.split()) for modules in MODULES}
    monkeypatch.setattr(calibrations, "SITES", sites)
    monkeypatch.setattr(calibrations, "HEADS", heads)
    warnings = ["mergekit leaves out 3 tensors of the reasoning model " * 3, "short"]
    path = calibrations.write(tmp_path / "large.rain.safetensors", layers, warnings=warnings)
    said = succeed("inspect", path).splitlines()
    assert len(said) <= 40
    assert max(map(len, said[1:])) <= 80
    assert "gate_proj up_proj" in "".join(said)


def test_inspect_as_json(path: Path, hostile: Path) -> None:
    found = json.loads(succeed("inspect", path, "--json"))
    assert found["kinds"][0]["rank"] == {"mean": 3, "low": 3, "high": 3}
    assert len(found["layers"][0]["heads"]["alpha"]) == calibrations.HEADS
    found = json.loads(succeed("inspect", hostile, "--json"))
    assert found["layers"][0]["heads"] == {"alpha": [None, 0.5, 1.5]}
    assert found["data"]["reasoning"]["total"] is None


def test_inspect_shows_no_escape_sequences_of_the_file(hostile: Path) -> None:
    said = succeed("inspect", hostile, color=True)
    assert "\x1b[31m" not in said
    assert "\\x1b[31m" in said


def test_inspect_in_a_terminal(path: Path) -> None:
    said = in_terminal(path)
    assert "▁" in said
    assert "\x1b[38;5;" in said


def test_no_colour_where_it_is_not_wanted(path: Path) -> None:
    assert "\x1b[" in succeed("inspect", path, color=True)
    assert "\x1b[" not in succeed("inspect", path, color=True, env={"NO_COLOR": "1"})


def in_terminal(path: Path) -> str:
    """What `inspect` writes to a real terminal."""
    ours, theirs = pty.openpty()
    script = "from rain_mergekit.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", script, "inspect", str(path)],
        stdout=theirs,
        env={**os.environ, "PYTHONUTF8": "1"},
    ) as process:
        os.close(theirs)
        said = b""
        with open(ours, "rb", buffering=0) as terminal:
            while part := read(terminal):
                said += part
    assert process.returncode == 0
    return said.decode()


def read(terminal: Any) -> bytes:
    try:
        part: bytes = terminal.read(4096)
    except OSError:  # Linux's end of file of a terminal
        return b""
    return part


def test_inspect_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no calibration")
    for command in ("inspect", "report"):
        outcome = run(command, tmp_path / "text")
        assert outcome.code == 1
        assert "cannot be used" in outcome.output
    assert not (tmp_path / "report.html").exists()


# report


@pytest.mark.parametrize("which", ["page", "hostile_page"])
def test_page_is_whole_and_loads_nothing(which: str, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(which)
    parsed = Page(text)
    assert not {"script", "img", "link", "iframe", "object", "base"} & set(parsed.tags)
    loads = [v for n, v in parsed.attributes if n in ("src", "href", "xlink:href", "action")]
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in loads)
    assert not [n for n, _ in parsed.attributes if n.startswith("on")]
    assert re.findall(r"url\((?!#)|@import", text) == []
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = re.findall(r"url\(#([^)]+)\)", text) + [v[1:] for v in loads if v[0] == "#"]
    assert set(targets) <= set(ids)


def test_page_shows_everything(page: str) -> None:
    parsed = Page(page)
    # 4 by layer, 2 spectra of 2 kinds, 3 heat maps, 1 histogram
    assert parsed.tags["svg"] == 4 + 4 + 3 + 1
    for text in (
        "org/instruct",
        "reasoning.jsonl",
        "ab" * 32,
        "max_rank",
        "Look for",
        "0.905",
    ):
        assert text in parsed.text


def test_hostile_names_are_text(hostile_page: str) -> None:
    parsed = Page(hostile_page)
    assert "</code><script>alert(1)</script>" in parsed.text
    assert "<script" not in hostile_page


def test_page_without_sites(tmp_path: Path) -> None:
    bare = calibrations.header(0)
    write_calibration(
        tmp_path / "bare", {k: v for k, v in bare.items() if k != "settings"}, {"x": torch.ones(1)}
    )
    assert "Nothing: the merge" in render(CalibrationFile.open(tmp_path / "bare"))


def test_same_numbers_same_picture() -> None:
    drawn = [figures.histogram("p", "x", [1.0, 2.0], [0.5]) for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_report_overwrites_pages_only(path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(path, tmp_path / "mine"))
    assert "not an HTML page" in refused(tmp_path, "report", path, "-o", copy)
    assert copy.read_bytes() == path.read_bytes()


def test_options_that_need_a_merged_model(path: Path) -> None:
    for option in ("--against", "--reasoning-data"):
        assert run("report", path, option, "x").code == 2


@pytest.mark.parametrize("command", ["inspect", "report", "card", "sweep"])
def test_help_has_an_example(command: str) -> None:
    assert f"Example:\n    mergekit-rain {command}" in succeed(command, "--help")


def test_missing_library(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("report", path, "-o", path.with_name("page.html"))
    assert done.code == 1
    assert "needs matplotlib" in done.output
    assert "pip install 'rain-mergekit[report]'" in done.output


# In a browser


def test_in_a_browser(page: str, hostile_page: str, tmp_path: Path) -> None:
    browser.check([page, hostile_page], tmp_path)


def test_missing_browser_is_no_excuse_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no browser is installed"):
        browser.find()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="no browser is installed"):
        browser.find()
