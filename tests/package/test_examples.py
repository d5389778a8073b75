"""What the README's YAML names comes with the wheel: `mergekit-rain examples` copies it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from commands import refused, succeed
from doc_blocks import ROOT, blocks
from environments import Environment

from rain_mergekit.config.merge_config import read_config
from rain_mergekit.text import calibration_sets

SHOWN = """
from pathlib import Path
from rain_mergekit.config.merge_config import read_config
from rain_mergekit.text import calibration_sets
settings = read_config(Path("readme.yml")).settings
print(len(calibration_sets.read_reasoning(settings.reasoning_data)))
print(len(calibration_sets.read_instruction(settings.instruction_data)))
"""


def readme_yaml() -> str:
    return next(b.text for b in blocks(ROOT / "README.md") if b.language == "yaml")


def test_the_readmes_yaml_works_from_a_wheel(installed: Environment) -> None:
    done = installed.run(str(installed.path / "bin" / "mergekit-rain"), "examples", ".")
    assert (done.returncode, done.stderr) == (0, "")
    (installed.path / "readme.yml").write_text(readme_yaml(), encoding="utf-8")
    reasoning, instruction = installed.check(SHOWN).splitlines()
    assert (int(reasoning), int(instruction)) == (73, 340)


def test_every_configuration_finds_its_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    succeed("examples")
    configs = sorted(Path("configs").glob("*.yml"))
    assert len(configs) == 6
    for path in configs:
        settings = read_config(path).settings
        assert calibration_sets.read_reasoning(Path(settings.reasoning_data))
        assert settings.instruction_data is not None
        assert calibration_sets.read_instruction(Path(settings.instruction_data))
    assert yaml.safe_load(Path("trio/reasoning/config.json").read_text(encoding="utf-8"))


def test_files_of_the_user_stay(tmp_path: Path) -> None:
    mine = tmp_path / "configs" / "reference.yml"
    succeed("examples", str(tmp_path))
    succeed("examples", str(tmp_path))  # what is the same may be there
    mine.write_text("mine", encoding="utf-8")
    (tmp_path / "trio" / "reasoning.jsonl").unlink()
    message = refused(tmp_path, "examples", tmp_path)
    assert "configs/reference.yml there would be overwritten" in message
    assert mine.read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "trio" / "reasoning.jsonl").exists()


def test_a_link_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "here" / "configs").mkdir(parents=True)
    (tmp_path / "here" / "configs" / "reference.yml").symlink_to(tmp_path / "elsewhere.yml")
    assert "would be overwritten" in refused(tmp_path, "examples", tmp_path / "here")
    assert not (tmp_path / "elsewhere.yml").exists()


def test_a_folder_that_cannot_be_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "file: cannot be written" in refused(tmp_path, "examples", tmp_path / "file")
