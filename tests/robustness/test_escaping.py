"""Names, values and texts of other people stay text: in model cards, pages and on terminals."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from random import Random

import browser
import calibrations
import markdown
import pytest
import yaml
from commands import Workplace, make_models, make_workplace, refused, run, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import changed

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.site_names import Site, ValueRange
from rain_mergekit.calibration_file.summary import Data, FileSummary
from rain_mergekit.commands.console import Console
from rain_mergekit.config.merge_config import RainConfig, read_config
from rain_mergekit.errors import RainError
from rain_mergekit.evaluation import verification_record
from rain_mergekit.evaluation.divergence import Drift, Place
from rain_mergekit.evaluation.layerwise_drift import SiteDrift
from rain_mergekit.evaluation.marker_distance import MarkerDistanceProfile
from rain_mergekit.evaluation.task_vectors import Change, TaskVectors
from rain_mergekit.evaluation.verify import VerificationResult
from rain_mergekit.report import model_card, page
from rain_mergekit.report.front_matter import with_tags

# What means something in Markdown, HTML, YAML or a table, and what steers a terminal.
SPECIAL = "`|<>[]()!*_#&;:'\"\\{}%$~-=+. \n\r\t\x00\x07\x1b\x7f\x85\x9b\u2028\u202e\ud800é"
WORDS = (
    "</code><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![x](http://evil.example/x.png)",
    "[x](javascript:alert(1))",
    "` | <b>x</b> | `",
    "``` \n# Owned\n---\nlicense: mit\n---\n",
    "-->",
    model_card.END,
    model_card.BEGIN,
    "\x1b]0;owned\x07\x1b[2J",
    "{{ 7 * 7 }}{% raw %}",
    "]]>",
    "http://evil.example",
    "<http://evil.example>",
    "&lt;script&gt;",
    "org/../x",
)
hostile = st.lists(st.sampled_from([*WORDS, *SPECIAL]), min_size=1, max_size=8).map("".join)


class Shown(HTMLParser):
    """What a reader of the page would get: elements, where links lead, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]


def rendered(text: str) -> Shown:
    return Shown(markdown.markdown(text, extensions=["tables", "fenced_code"]))


def controls(text: str) -> set[str]:
    """Characters other than line ends that a terminal or an editor obeys."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - {"\n"}


def summary(text: str) -> FileSummary:
    """Of a file in which everything that can be a text is this one."""
    return FileSummary(
        kind="rain",
        path=text,
        bytes=1,
        created_by=text,
        models=dict.fromkeys(("reasoning", "instruct", "pretrained"), text),
        data={"reasoning": Data(text, text, None, None, None)},
        settings={"projection": text, "coefficients": text},
        changed={},
        tensors=0,
        kinds=(),
        sites=(Site("s", "s", 0, 4, 2, 0.5, 0.5, capped=False),),
        layers=(),
        warnings=(text,),
    )


def config(tmp_path: Path, strength: object = 1.0) -> RainConfig:
    path = tmp_path / "config.yml"
    content = {
        "merge_method": "rain",
        "base_model": "org/reasoning",
        "models": [
            {"model": f"org/{role}", "parameters": {"role": role}}
            for role in ("instruct", "pretrained")
        ],
        "parameters": {"calibration": "c", "lambda": strength},
        "rain": {"reasoning_data": "r", "instruction_data": "i", "fit": "projection"},
    }
    path.write_text(yaml.safe_dump(content))
    return read_config(path)


@settings(max_examples=150)
@given(text=hostile)
def test_nothing_breaks_out_of_the_card(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    """Whatever it is, the card has the elements and links that it has with plain names."""
    place = config(tmp_path_factory.getbasetemp())
    plain, odd = (
        model_card.section(
            place, summary(t), verification_record.VerificationRecord(0.1, 0.1, 0.1, 3, t, t, t)
        )
        for t in ("plain", text)
    )
    assert not controls(odd)
    assert len(odd.splitlines()) == len(plain.splitlines())
    page = rendered(odd)
    assert page.tags == rendered(plain).tags
    assert page.links == ["https://arxiv.org/abs/2602.22538"]
    whole = model_card.with_section("# Mine\n", odd)
    assert model_card.with_section(whole, odd) == whole  # the comments around it are still one pair


def test_only_names_of_the_hub_become_links(tmp_path: Path) -> None:
    place = config(tmp_path)
    page = rendered(model_card.section(place, summary("org/name-1.5_b"), None))
    assert set(page.links) == {
        "https://arxiv.org/abs/2602.22538",
        "https://huggingface.co/org/name-1.5_b",
    }
    for name in (
        "org/na me",
        "//evil.example",
        "org/x/y",
        "a:b/c",
        "org/x\n",
        "-x/y",
        "/a/b",
        "../a",
    ):
        page = rendered(model_card.section(place, summary(name), None))
        assert page.links == ["https://arxiv.org/abs/2602.22538"], name


@settings(max_examples=300)
@given(block=hostile, body=hostile)
def test_front_matter_gets_tags_and_nothing_else(block: str, body: str) -> None:
    """Of any card: refused, or the same block with the tags, before the same text."""
    text = f"---\n{block}\n---\n{body}"
    try:
        new = with_tags(text, model_card.TAGS)
    except RainError:
        return
    had = yaml.safe_load(block) if text.count("\n---") == 1 and "\n---" not in block else None
    assert new.endswith(body)
    found = re.match(r"---[ \t]*\r?\n((?:.*\n)*?)---[ \t]*(?:\r?\n|\Z)", new)
    assert found is not None
    content = yaml.safe_load(found[1])
    assert set(model_card.TAGS) <= set(content["tags"])
    if isinstance(had, dict) and new != text:
        assert {k: v for k, v in content.items() if k != "tags"} == {
            k: v for k, v in had.items() if k != "tags"
        }


MEASURED = {
    "weights": "ab",
    "L_think": 0.1,
    "L_mid": 0.1,
    "L_rest": 0.1,
    "samples": 3,
    "data": "r.jsonl",
    "data_sha256": "ab",
    "verdict": "kept",
}


@settings(max_examples=300)
@given(chance=st.integers(0, 2**60).map(Random))
def test_a_measurement_that_is_broken_is_none(
    tmp_path_factory: pytest.TempPathFactory, chance: Random
) -> None:
    folder = tmp_path_factory.getbasetemp()
    text = json.dumps(changed(MEASURED, chance, float("inf"), 10**400, "1e999", "[" * 99))
    (folder / verification_record.NAME).write_text(text)
    with suppress(RainError):  # where it is whole, the weights are looked at: there are none
        assert verification_record.load(folder) is None


def test_a_measurement_without_end_is_none(tmp_path: Path) -> None:
    for content in ("[" * 100_000, json.dumps(MEASURED).replace("3", "Infinity")):
        (tmp_path / verification_record.NAME).write_text(content)
        assert verification_record.load(tmp_path) is None


def everywhere(folder: Path, text: str) -> str:
    """The page with the text wherever one of somebody else can stand."""
    place = Place(0.02, 5)
    drift = Drift(place, place, place, 3, text, 0.5)
    spread = {0: ValueRange(0.1, 0.1, 0.1)}
    layers = ({text: SiteDrift(1.0, 0.1)},)
    measured = VerificationResult(layers, drift, MarkerDistanceProfile(spread, spread), None, text)
    merged = page.Merged(text, {text: {0: 0.5}}, measured, text)
    vectors = TaskVectors((Change(text, 0, 1.0, 0.5, None),), 2, (text,))
    remarks = {"created_by": text, "warnings": [text], "settings": {text: text, "window": text}}
    path = calibrations.write(folder / "c", 1, **remarks)
    return page.render(CalibrationFile.open(path), merged, vectors)


def test_nothing_breaks_out_of_the_page(tmp_path: Path) -> None:
    text = " ".join(WORDS) + SPECIAL
    pages = (everywhere(tmp_path, t).encode(errors="replace").decode() for t in ("x", text))
    plain, odd = map(browser.Page, pages)
    assert odd.tags == plain.tags
    assert [name for name, _ in odd.attributes] == [name for name, _ in plain.attributes]
    assert "<script>alert(1)</script>" in odd.text
    assert "{{ 7 * 7 }}{% raw %}" in odd.text


def test_the_console_shows_what_would_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    for say in (console.print, console.heading, console.warn):
        say(f"model{SPECIAL}")
    said = capsys.readouterr()
    assert "\\x1b" in said.out
    assert "\\x1b" in said.err
    assert "\\u202e" in said.out
    assert not controls(re.sub(r"\x1b\[[0-9;]*m", "", said.out + said.err))


ODD = "<img src=x onerror=alert(1)>`|`[x](y) \x1b]0;owned\x07\u202e $(id) {{7*7}} 'a\"b"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Models, sets and configuration with names that try everything that a name may hold."""
    folder = tmp_path_factory.mktemp("odd")
    made = make_workplace(folder / ODD, make_models(folder / "models"), samples=4)
    data = folder / ODD / f"{ODD}.jsonl"
    data.write_text((folder / ODD / "reasoning.jsonl").read_text())
    made.config["rain"]["reasoning_data"] = str(data)
    made.write()
    return made


def test_hostile_names_through_every_command(place: Workplace) -> None:
    """Nothing that a command says steers the terminal, and what it writes is text."""
    data, out = place.config["rain"]["reasoning_data"], place.folder / "out"
    page = place.folder / "page.html"
    against = ("--against", place.model("reasoning"), "--reasoning-data", data)
    said = [
        succeed("data", "check", data, "--show", 0),
        succeed("calibrate", place.yaml),
        succeed("inspect", place.calibration),
        succeed("merge", place.yaml, out),
        run("verify", out, *against, "--card").output,
        succeed("sweep", place.yaml, "--lambda", 1, "-o", place.folder / "swept", "--table-only"),
        succeed("report", place.calibration, "--merged", out, *against, "-o", page),
        succeed("card", out),
    ]
    for text in said:
        assert not controls(text), text
        assert "owned" in text
    text = (out / "README.md").read_text(encoding="utf-8")
    part = text[text.index(model_card.BEGIN) :]
    assert not controls(part)
    assert rendered(part).links == ["https://arxiv.org/abs/2602.22538"]
    assert "img" not in rendered(part).tags
    assert "L_think" in part
    known = {"base_model", "library_name", "pipeline_tag", "tags"}
    assert yaml.safe_load(text.split("---\n")[1]).keys() <= known
    assert {"img", "script"}.isdisjoint(browser.Page(page.read_text(encoding="utf-8")).tags)


def test_texts_of_samples_are_shown_not_sent(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    sample = {"prompt": f"say {ODD}", "reasoning": f"why {ODD}", "response": ODD}
    broken = {**sample, "reasoning": f"</think>{ODD}"}
    path.write_text("".join(json.dumps(s) + "\n" for s in (sample, broken)))
    said = succeed("data", "check", path, color=True)
    assert said.count("\\x1b]0;owned\\x07\\u202e") >= 3
    assert not controls(re.sub(r"\x1b\[[0-9;]*m", "", said))


# Links: a folder that somebody else made must not name what is read into it or overwritten


@pytest.mark.parametrize("name", ["README.md", verification_record.NAME])
def test_links_that_lead_outside_are_not_followed(
    tmp_path: Path, place: Workplace, name: str
) -> None:
    mine = tmp_path / "mine"
    mine.write_text("my own\n")
    succeed("merge", place.yaml, tmp_path / "out")
    (tmp_path / "out" / name).unlink(missing_ok=True)
    (tmp_path / "out" / name).symlink_to(mine)
    data = place.config["rain"]["reasoning_data"]
    against = ("--against", place.model("reasoning"), "--reasoning-data", data)
    outcome = run("verify", tmp_path / "out", *against, "--card", "--samples", 1)
    assert outcome.code == 1
    assert f"{name}: is a link to outside of its folder" in outcome.output
    assert mine.read_text() == "my own\n"


@pytest.mark.parametrize("name", ["layer-00000.safetensors", "process-0/reasoning", ".bashrc"])
def test_a_work_folder_of_somebody_else_is_refused(
    tmp_path: Path, place: Workplace, name: str
) -> None:
    """Links, to which a layer's numbers would be written, and files that are not ours to remove."""
    mine = tmp_path / "mine"
    mine.write_text("my own\n")
    work = place.calibration.with_name(f"{place.calibration.name}.work")
    item = work / name
    item.parent.mkdir(parents=True)
    if name.startswith("."):
        item.write_text("my own\n")
    else:
        item.symlink_to(mine)
    try:
        said = refused(work, "calibrate", place.yaml)
        assert f"holds files that are not of a calibration ({item.name})" in said
        assert mine.read_text() == item.read_text() == "my own\n"
    finally:
        shutil.rmtree(work)
