"""`mergekit-rain finish` on a folder in which something is not as the reasoning model has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import Workplace, make_models, make_workplace, refused, succeed


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("finish")
    place = make_workplace(folder / "place", make_models(folder / "models"), samples=4)
    (place.model("reasoning") / "tekken.json").write_text("{}")
    succeed("merge", place.yaml, place.folder / "out")
    return place


def test_what_is_missing_or_changed_comes_back(place: Workplace) -> None:
    out = place.folder / "out"
    assert "Nothing to change" in succeed("finish", out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    (out / "tekken.json").unlink()
    (out / "config.json").write_text(json.dumps({"transformers_version": "0"}))
    said = succeed("finish", out)
    assert "Put back as the reasoning model has them: tekken.json" in said
    assert f"Finished {out}" in said
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_other_folders_are_refused(place: Workplace, tmp_path: Path) -> None:
    (tmp_path / "mergekit_config.yml").write_text(place.yaml.read_text())
    assert "holds no weights" in refused(tmp_path, "finish", tmp_path)
    assert "cannot read the configuration" in refused(tmp_path, "finish", place.model("instruct"))
