"""Two processes with gloo on the CPU give the file that one gives, to rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from architectures import make
from hangs import HANGS
from stored_changes import products
from tiny import Tiny
from torch import Tensor

from rain_mergekit.calibration.exchange import collect_rows
from rain_mergekit.calibration.fit_rule import sums_bytes
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.linalg.row_collector import RowCollector
from rain_mergekit.system.distributed import World, join


def torchrun(tiny: Tiny, *options: str) -> subprocess.CompletedProcess[str]:
    config = str(tiny.config().path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "rain_mergekit", "calibrate", config]
    return subprocess.run(
        [*command, "--device", "cpu", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )


def projectors(path: Path) -> Mapping[str, Tensor]:
    """U V^T of every site: factors are only unique up to signs."""
    file = CalibrationFile.open(path)
    found = {}
    for site in file.sites:
        factors = file.factors(site)
        assert factors.u is not None
        assert factors.v is not None
        found[site] = factors.u.double() @ factors.v.double().mT
    return found


@pytest.mark.parametrize(
    ("coefficients", "head"),
    [("off", "all"), pytest.param("normalized", "off", marks=pytest.mark.slow)],
)
def test_two_processes_give_the_same_file_as_one(
    tmp_path: Path, coefficients: str, head: str
) -> None:
    settings = {"coefficients": coefficients, "alpha_min": 0.0, "lm_head": head}
    one = Tiny.make(tmp_path, "qwen3", tie_word_embeddings=False).with_head("lm_head.weight")
    one = one.using(**settings)
    summary = one.calibrate()
    two = one.using(calibration="two.rain.safetensors", **settings)
    done = torchrun(two)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote") == 1
    first, second = CalibrationFile.open(one.path), CalibrationFile.open(two.path)
    for key in ("data", "models", "layers", "tensors"):
        assert first.header[key] == second.header[key]
    expected, found = projectors(one.path), projectors(two.path)
    for site, projector in expected.items():
        torch.testing.assert_close(found[site], projector, rtol=1e-4, atol=1e-5)
    for layer in first.header["layers"]:
        for key in layer["stats"].values():
            torch.testing.assert_close(first.tensor(key), second.tensor(key), rtol=1e-6, atol=1e-9)
    assert summary.layer_passes["reasoning"] == 3 * 2
    assert not two.path.with_name(two.path.name + ".work").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sums", "directions", "one answer"])
def test_two_processes_fit_what_one_fits(tmp_path: Path, kind: str) -> None:
    """directions: those of all tokens, because sums of d x d just exceed the budget.

    one answer: a process has none to read.
    """
    settings = {"fit": "streams", "stream_rank_share": 1.0, "stream_epsilon": 0.1}
    one = Tiny.make(tmp_path, "llama", intermediate_size=640).using(**settings)
    two = one.using(calibration="two.rain.safetensors", **settings)
    budget = 2 * sums_bytes(640) - (kind == "directions")
    if kind == "one answer":
        data = tmp_path / "instruction.jsonl"
        data.write_text(data.read_text().splitlines()[0] + "\n")
    one.calibrate(activation_budget=budget)
    done = torchrun(two, "--activation-budget", str(budget))
    assert done.returncode == 0, done.stderr
    expected, found = products(one.path), products(two.path)
    assert expected.keys() == found.keys()
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_processes_fit_the_same_experts_and_the_same_head(tmp_path: Path) -> None:
    settings = {"fit": "streams", "stream_rank_share": 1.0, "stream_epsilon": 0.1}
    one = make(tmp_path, "qwen3_moe").using(**settings, lm_head="all")
    two = one.using(calibration="two.rain.safetensors", **settings, lm_head="all")
    one.calibrate()
    done = torchrun(two)
    assert done.returncode == 0, done.stderr
    first, second = (CalibrationFile.open(file.path) for file in (one, two))
    assert first.header["streams"]["layers"][0]["experts"].keys() == {"mlp.experts"}
    for layer, other in zip(*(f.header["streams"]["layers"] for f in (first, second)), strict=True):
        assert layer["experts"] == other["experts"]
    expected, found = products(one.path), products(two.path)
    assert "lm_head.weight" in expected
    assert expected.keys() == found.keys()
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=1e-3, atol=1e-5)


def test_more_processes_than_samples_are_refused(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "llama")
    data = tmp_path / "reasoning.jsonl"
    data.write_text(json.dumps(json.loads(data.read_text().splitlines()[0])) + "\n")
    done = torchrun(tiny)
    assert done.returncode != 0
    assert "at most one process a sample" in done.stderr


def test_one_process_alone_needs_no_group() -> None:
    world = join("cpu")
    assert world == World(torch.device("cpu"))
    collector = RowCollector()
    collector.add(torch.ones(2, 3))
    collect_rows(world, collector, 3, owner=0)
    assert collector.count == 2
    assert world.agree(flag=True)
    assert torch.equal(world.sum(torch.ones(2)), torch.ones(2))
    assert list(world.part([1, 2, 3])) == [1, 2, 3]
    world.wait()


def test_taken_rows_keep_their_second_moment_and_count() -> None:
    source, target = RowCollector(), RowCollector()
    for size in (3, 40):
        source.add(torch.randn(size, 5))
    before = source.rows()
    assert before is not None
    rows, count = source.take(5, torch.device("cpu"))
    assert (source.count, source.rows()) == (0, None)
    target.put(rows, count)
    after = target.rows()
    assert after is not None
    assert target.count == 43
    torch.testing.assert_close(after.dense().mT @ after.dense(), before.dense().mT @ before.dense())
