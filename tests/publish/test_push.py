"""To the hub and back: what goes there, what never does, and the same bits from what is there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import model_hub
import pytest
import yaml
from commands import Workplace, make_models, make_workplace, refused, run, succeed
from model_hub import Hub
from safetensors import safe_open

# What the hub's client calls in its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TOKEN = "hf_" + "secret" * 5
NAME = "me/merged"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Two models that the hub has, merged on this machine with streams; not by `auto`."""
    folder = tmp_path_factory.mktemp("place")
    place = make_workplace(folder / "work", make_models(folder / "models"), samples=3)
    models = [{"model": str(place.model("instruct")), "parameters": {"role": "instruct"}}]
    place.write(models=models, rain={"fit": "streams"})
    succeed("merge", place.yaml, place.folder / "out", "--quiet")
    return place


@pytest.fixture(name="served")
def _served(merged: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    repositories = {f"acme/{role}": merged.model(role) for role in ("reasoning", "instruct")}
    with model_hub.hub(repositories, tmp_path / "hub", TOKEN) as found:
        model_hub.use(found, monkeypatch, tmp_path / "cache")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def test_there_and_back(merged: Workplace, served: Hub, tmp_path: Path) -> None:
    out = merged.folder / "out"
    (out / "rain").mkdir(exist_ok=True)
    page = out / "rain" / "report.html"
    succeed("report", merged.calibration, "--merged", out, "-o", page, "--samples", "1")
    assert str(merged.folder) in page.read_text()
    said = succeed("push", out, NAME)
    folder = served.repositories[NAME]
    assert served.private[NAME]
    assert "private" in said
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
    wanted = {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
    wanted |= {"rain/reproduce.json", "rain/calibration.rain.safetensors", "mergekit_config.yml"}
    wanted |= {"rain/report.html"}
    assert wanted <= set(files)
    assert files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    for name, data in files.items():
        assert str(merged.folder).encode() not in data, name
        assert TOKEN.encode() not in data, name
    assert TOKEN not in said

    record = json.loads(files["rain/reproduce.json"])
    calibration = files["rain/calibration.rain.safetensors"]
    assert record["calibration"] == hashlib.sha256(calibration).hexdigest()
    assert record["tensors"] == digests(out / "model.safetensors")
    assert {"rain_mergekit", "mergekit", "torch", "python"} <= set(record["versions"])
    assert record["models"]["reasoning"]["fingerprint"]["weights"]

    places = [f"--{role}={merged.model(role)}" for role in ("reasoning", "instruct")]
    again = tmp_path / "again"
    assert "The same bits: all" in succeed("reproduce", NAME, "-o", again, *places)
    assert digests(again / "model.safetensors") == record["tensors"]
    # Not the cache: older hub libraries write the same revision there again.
    assert "where it is with --reasoning" in refused(again, "reproduce", NAME, "-o", "x")

    record["tensors"]["lm_head.weight"] = "0" * 64
    record["versions"]["torch"] = "1.0"
    (folder / "rain" / "reproduce.json").write_text(json.dumps(record))
    outcome = run("reproduce", folder, "-o", tmp_path / "third", *places)
    assert outcome.code == 4, outcome.output
    assert "tensors are not the same bits: lm_head.weight" in outcome.output
    assert "torch was 1.0, is" in outcome.output
    assert "It is at" in succeed("push", out, NAME)  # a newer version of our own


def digests(path: Path) -> dict[str, str]:
    """Of what the file holds, read byte by byte from its header."""
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        kinds = {name: (file.get_tensor(name).dtype, shapes[name]) for name in names}
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    found = {}
    for name, (dtype, shape) in kinds.items():
        start, end = header[name]["data_offsets"]
        text = f"{dtype} {shape}\n".encode() + data[8 + length + start : 8 + length + end]
        found[name] = hashlib.sha256(text).hexdigest()
    return found


def test_what_would_harm_others_is_refused(merged: Workplace, served: Hub, tmp_path: Path) -> None:
    out = merged.folder / "out"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes(b"somebody's")
    served.repositories["me/other"] = foreign
    assert "was not put there by" in run("push", out, "me/other").output
    assert (foreign / "model.safetensors").read_bytes() == b"somebody's"
    public = tmp_path / "public"
    (public / "rain").mkdir(parents=True)
    (public / "rain" / "reproduce.json").write_text("{}")
    served.repositories["me/public"] = public
    served.private["me/public"] = False
    assert "is public on the hub" in run("push", out, "me/public").output
    assert "is not a name on the hub" in run("push", out, "merged").output


def test_without_a_token_it_says_how_to_log_in(
    merged: Workplace, served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 5)
    outcome = run("push", merged.folder / "out", NAME)
    assert outcome.code == 1
    assert "hf auth login" in outcome.output
    assert "wrongwrong" not in outcome.output
    assert NAME not in served.repositories


def test_only_merges_are_pushed(merged: Workplace) -> None:
    assert "cannot read the configuration" in run("push", merged.model("reasoning"), NAME).output
    assert "in all; nothing was sent" in succeed("push", merged.folder / "out", NAME, "--dry-run")
    assert yaml.safe_load((merged.folder / "out" / "mergekit_config.yml").read_text())


def test_shards_go_there_with_their_index(merged: Workplace, served: Hub, tmp_path: Path) -> None:
    """In either format: without it no loader finds the second shard."""
    for name, option in (("safe", "--safe-serialization"), ("pickled", "--no-safe-serialization")):
        out = tmp_path / name
        succeed("merge", merged.yaml, out, option, "--out-shard-size", "200K", "--quiet")
        succeed("push", out, f"me/{name}")
        folder = served.repositories[f"me/{name}"]
        (index,) = folder.glob("*.index.json")
        shards = set(json.loads(index.read_text())["weight_map"].values())
        assert len(shards) > 1
        assert all((folder / shard).is_file() for shard in shards)


@pytest.mark.usefixtures("served")
def test_a_published_merge_of_published_models(merged: Workplace, tmp_path: Path) -> None:
    """With names on the hub nobody has to say where anything is."""
    models = [{"model": "acme/instruct", "parameters": {"role": "instruct"}}]
    config = yaml.safe_load(merged.yaml.read_text())
    text = yaml.safe_dump({**config, "base_model": "acme/reasoning", "models": models})
    (tmp_path / "hub.yml").write_text(text)
    succeed("merge", tmp_path / "hub.yml", tmp_path / "out", "--quiet")
    succeed("push", tmp_path / "out", "me/second", "--quiet")
    said = succeed("reproduce", "me/second", "-o", tmp_path / "again")
    assert "The same bits" in said
