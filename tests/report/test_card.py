"""The model card: our part is added and renewed, and a user's text stays as it is."""

from __future__ import annotations

from pathlib import Path

import calibrations
import pytest
import yaml
from commands import refused, run, succeed

from rain_mergekit.errors import RainError
from rain_mergekit.report.front_matter import with_tags
from rain_mergekit.report.model_card import BEGIN, END, TAGS, publish_names, with_section

CONFIG = """\
merge_method: rain
base_model: org/reasoning
models:
  - {{model: org/instruct, parameters: {{role: instruct}}}}
  - {{model: org/pretrained, parameters: {{role: pretrained}}}}
parameters: {{calibration: {calibration}, lambda: [0.5, 1.0]}}
rain: {{reasoning_data: r.jsonl, instruction_data: i.jsonl, fit: projection}}
"""


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """A folder as a merge leaves it, without the weights, which the card does not need."""
    file = calibrations.write(tmp_path / "some.rain.safetensors", 2)
    folder = tmp_path / "merged"
    folder.mkdir()
    text = CONFIG.format(calibration=file)
    (folder / "mergekit_config.yml").write_text(text)
    (folder / "README.md").write_text("---\ntags:\n- mergekit\n---\n# Title\n\nMy own words.\n")
    return folder


def card(folder: Path) -> str:
    return (folder / "README.md").read_bytes().decode()


def test_card_says_how_the_model_was_made(merged: Path) -> None:
    assert "Wrote" in succeed("card", merged)
    text = card(merged)
    for part in (
        "# Title\n\nMy own words.\n",
        "| instruct model | [org/instruct](https://huggingface.co/org/instruct) |",
        "| strength λ | `[0.5, 1.0]` |",
        f"`reasoning.jsonl`, 8 of 9 samples, SHA-256 `{'ab' * 32}`",
        "mean rank 3.0 over 4 input sites, kept energy 0.90",
        "arXiv:2602.22538",
    ):
        assert part in text
    assert yaml.safe_load(text.split("---")[1])["tags"] == list(TAGS)


def test_card_says_that_the_head_was_merged(merged: Path) -> None:
    succeed("card", merged)
    assert "output head" not in card(merged)
    file = merged.parent / "some.rain.safetensors"
    calibrations.write(file, 2, settings={"reasoning_data": "r", "lm_head": "all"})
    succeed("card", merged)
    assert "| output head, merged and projected too | `all` |" in card(merged)


def test_second_time_changes_nothing(merged: Path) -> None:
    succeed("card", merged)
    before = (merged / "README.md").stat().st_mtime_ns, card(merged)
    assert "Nothing to change" in succeed("card", merged)
    assert ((merged / "README.md").stat().st_mtime_ns, card(merged)) == before


def test_text_around_our_part_stays(merged: Path) -> None:
    succeed("card", merged)
    text = card(merged).replace("8 of 9", "outdated").replace("# Title", "# Another")
    (merged / "README.md").write_text(text + "\nMy last words.\n")
    succeed("card", merged)
    assert "8 of 9" in card(merged)
    assert "# Another\n\nMy own words." in card(merged)
    assert card(merged).endswith(f"{END}\n\nMy last words.\n")


def test_line_ends_of_the_card_are_kept(merged: Path) -> None:
    before = "---\r\nlicense: mit\r\n---\r\n# Title\r\n"
    (merged / "README.md").write_bytes(before.encode())
    succeed("card", merged)
    text = card(merged)
    assert text.count("\n") == text.count("\r\n")
    assert text.startswith("---\r\nlicense: mit\r\ntags:\r\n- mergekit\r\n")
    assert "Nothing" in succeed("card", merged)


def test_without_a_card_one_is_made(merged: Path) -> None:
    (merged / "README.md").unlink()
    succeed("card", merged)
    text = card(merged)
    assert text.startswith("---\ntags:\n- mergekit\n- merge\n- rain-merging\nbase_model:\n")
    assert text.split("---\n")[2].startswith(f"\n{BEGIN}\n")


def test_hub_shows_what_the_model_was_made_of(merged: Path) -> None:
    """The license is the reasoning model's; what an owner wrote there stays."""
    succeed("card", merged)
    fields = yaml.safe_load(card(merged).split("---")[1])
    assert fields["base_model"] == ["org/reasoning", "org/instruct", "org/pretrained"]
    assert (fields["base_model_relation"], fields["pipeline_tag"]) == ("merge", "text-generation")
    own = merged.parent / "models--acme--thinker" / "snapshots" / ("ab" * 20)
    own.mkdir(parents=True)
    (own / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n")
    config = merged / "mergekit_config.yml"
    config.write_text(config.read_text().replace("org/reasoning", str(own)))
    (merged / "README.md").write_text("---\npipeline_tag: image-text-to-text\n---\n")
    file = merged.parent / "some.rain.safetensors"
    models = calibrations.header(2, references={"reasoning": str(own)})["models"]
    calibrations.write(file, 2, models=models)
    succeed("card", merged)
    text = card(merged)
    fields = yaml.safe_load(text.split("---")[1])
    assert fields["base_model"] == ["acme/thinker", "org/instruct", "org/pretrained"]
    assert (fields["license"], fields["pipeline_tag"]) == ("apache-2.0", "image-text-to-text")
    assert f"[acme/thinker](https://huggingface.co/acme/thinker/tree/{own.name})" in text
    assert str(merged.parent) not in text


def test_base_models_of_a_new_card_are_found_on_the_hub(merged: Path) -> None:
    """mergekit lists none that is given by a folder of the hub's cache, or an adapter there."""
    own = merged.parent / "models--acme--thinker" / "snapshots" / ("ab" * 20)
    own.mkdir(parents=True)
    (own / "README.md").write_text("---\npipeline_tag: image-text-to-text\n---\n")
    config = merged / "mergekit_config.yml"
    text = config.read_text().replace("org/reasoning", str(own))
    config.write_text(text.replace("org/instruct", f"{own}+org/adapter"))
    (merged / "README.md").write_text("---\nbase_model: []\ntags: [merge]\n---\n# T\n")
    publish_names(merged)
    fields = yaml.safe_load(card(merged).split("---")[1])
    assert fields["base_model"] == ["acme/thinker", "org/adapter", "org/pretrained"]
    assert (fields["tags"], fields["pipeline_tag"]) == (["merge"], "image-text-to-text")
    assert card(merged).endswith("---\n# T\n")


@pytest.mark.parametrize("value", ["[]", "", "null", "[ ]"])
def test_empty_list_of_base_models_is_filled(merged: Path, value: str) -> None:
    """As stock mergekit leaves it where all models are folders."""
    (merged / "README.md").write_text(f"---\na: 1\nbase_model: {value}\ntags: [x]\n---\n")
    outcome = run("card", merged)
    if value == "[ ]":
        assert "has base_model in a form that cannot be filled in" in outcome.output
        return
    fields = yaml.safe_load(card(merged).split("---")[1])
    assert fields["base_model"] == ["org/reasoning", "org/instruct", "org/pretrained"]
    assert fields["a"] == 1
    assert "Nothing to change" in succeed("card", merged)


def test_folders_of_this_machine_are_not_published(merged: Path) -> None:
    local = merged.parent / "my-thinker"
    local.mkdir()
    config = merged / "mergekit_config.yml"
    config.write_text(config.read_text().replace("org/reasoning", str(local)))
    (merged / "README.md").write_text(f"# made of {local} and more\n")
    publish_names(merged)
    assert card(merged) == "# made of my-thinker and more\n"


def test_names_cannot_break_out(merged: Path) -> None:
    name = f"x` | {END} <script>\n# Owned"
    file = calibrations.write(merged / "odd", 1, references=None)
    header = calibrations.header(1, references={"reasoning": name})
    calibrations.write(file, 1, models=header["models"])
    succeed("card", merged, "--calibration", file)
    text = card(merged)
    assert text.count(END) == 1
    assert "<script>" not in text
    assert "\n# Owned" not in text
    assert "Nothing" in succeed("card", merged, "--calibration", file)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{BEGIN}\nno end\n", "not one pair"),
        (f"{END}\n{BEGIN}\n", "not one pair"),
        (f"{BEGIN}{END}{BEGIN}{END}", "not one pair"),
        ("---\n: [\n---\n", "not valid YAML"),
        ("---\n- a list\n---\n", "not a mapping"),
    ],
)
def test_card_that_cannot_be_kept_is_left_alone(merged: Path, text: str, words: str) -> None:
    (merged / "README.md").write_text(text)
    assert words in refused(merged, "card", merged)


def test_other_things_that_are_wrong(merged: Path) -> None:
    (merged / "README.md").write_bytes(b"\xff\xfe")
    assert "cannot read the model card" in refused(merged, "card", merged)
    assert "does not exist" in refused(merged, "card", merged, "--calibration", "nowhere")
    file = merged / "mergekit_config.yml"
    assert f"{file}: is a file, expected the folder" in refused(merged, "card", file)
    file.unlink()
    assert "cannot read the configuration" in refused(merged, "card", merged)
    assert run("card").code == 2


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (
            "tags:\n  - a # first\n  - b\nlicense: mit\n",
            "tags:\n  - a # first\n  - b\n  - t\nlicense: mit\n",
        ),
        ("tags: [a, b] # mine\n", 'tags: ["a", "b", "t"] # mine\n'),
        ("tags: a\n", 'tags: ["a", "t"]\n'),
        ("tags:\nlicense: mit\n", 'tags: ["t"]\nlicense: mit\n'),
        ("tags: []\n", 'tags: ["t"]\n'),
        ("license: mit\n", "license: mit\ntags:\n- t\n"),
        ("tags: [t]\n", "tags: [t]\n"),
        ("", "tags:\n- t\n"),
        ("tags:\n- a\n\n", "tags:\n- a\n- t\n\n"),
    ],
)
def test_tags_are_added_as_text(block: str, expected: str) -> None:
    assert with_tags(f"---\n{block}---\nbody\n", ["t"]) == f"---\n{expected}---\nbody\n"


def test_tags_in_an_odd_form_are_refused() -> None:
    with pytest.raises(RainError, match="in a form that cannot be added to"):
        with_tags("---\nother: &x [a]\ntags: *x\n---\n", ["t"])


def test_rule_in_the_text_is_no_front_matter() -> None:
    assert with_tags("# T\n---\n", ["t"]) == "---\ntags:\n- t\n---\n# T\n---\n"


def test_section_goes_to_the_end() -> None:
    part = f"{BEGIN}\nx\n{END}\n"
    assert with_section("", "x") == part
    assert with_section("a", "x") == f"a\n\n{part}"
    assert with_section("a\n", "x") == f"a\n\n{part}"


PLAIN = """\
merge_method: opcm
base_model: org/pretrained
models:
  - model: org/reasoning
  - {model: org/instruct, parameters: {weight: 0.5}}
  - model: org/pretrained
parameters: {alpha: [0.5, 0.7], normalize: tensor}
"""


def test_card_of_a_merge_without_a_calibration(tmp_path: Path) -> None:
    (tmp_path / "mergekit_config.yml").write_text(PLAIN)
    succeed("card", tmp_path)
    text = card(tmp_path)
    for part in (
        "## OPCM",
        "by [OPCM](https://arxiv.org/abs/2501.09522) with mergekit",
        "| base | [org/pretrained](https://huggingface.co/org/pretrained) |",
        '| model 2 | [org/instruct](https://huggingface.co/org/instruct), `{"weight": 0.5}` |',
        "| `alpha` | `[0.5, 0.7]` |",
    ):
        assert part in text
    fields = yaml.safe_load(text.split("---")[1])
    assert fields["tags"] == ["mergekit", "merge"]
    assert fields["base_model"] == ["org/pretrained", "org/reasoning", "org/instruct"]
    assert "Nothing to change" in succeed("card", tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("merge_method: nothing\nmodels:\n- model: org/a\n", "which mergekit does not know"),
        (
            "merge_method: linear\nslices:\n- sources:\n  - {model: org/a, layer_range: [1, 2]}\n",
            "only merges that list whole models",
        ),
    ],
)
def test_what_cannot_be_described_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mergekit_config.yml").write_text(text)
    assert said in refused(tmp_path, "card", tmp_path)
