"""Task vectors in the report: against dense numpy, and what the page says where they are away."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import architectures
import browser
import calibrations
import numpy as np
import pytest
import torch
from architectures import store_as_modules
from commands import refused, succeed
from merging import Calibration, Trio, make_calibration

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.evaluation.task_vectors import (
    TaskVectors,
    measure_task_vectors,
    overlap,
    principal,
)
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.loading import LoadOptions, open_checkpoint

RANK = 3


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    return Trio.make(tmp_path_factory.mktemp("trio"))


@pytest.fixture(scope="module")
def calibration(trio: Trio) -> Calibration:
    return make_calibration(trio)


@pytest.fixture(scope="module")
def path(calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibration.write(tmp_path_factory.mktemp("file") / "some.rain.safetensors")


@pytest.fixture(scope="module")
def found(path: Path, trio: Trio) -> TaskVectors:
    models = {
        role: open_checkpoint(str(getattr(trio, role)), LoadOptions())
        for role in ("reasoning", "instruct", "pretrained")
    }
    return measure_task_vectors(CalibrationFile.open(path), models, RANK)


def test_norms_are_those_of_dense_matrices(
    found: TaskVectors, calibration: Calibration, trio: Trio
) -> None:
    """Oblique, orthogonal, soft and no projection, row and column scales, in float64."""
    instruct, pretrained = trio.weights("instruct"), trio.weights("pretrained")
    assert len(found.changes) == len(calibration.header["tensors"])
    assert found.remarks == ()
    for change in found.changes:
        name = tensor_name(change.module, change.layer, calibration)
        plan = calibration.header["tensors"][name]
        delta = (instruct[name].double() - pretrained[name].double()).numpy()
        assert change.before == pytest.approx(np.linalg.norm(delta), rel=1e-5)
        for key, axis in (("rows", 1), ("cols", 0)):
            if plan[key] is not None:
                delta = delta * np.expand_dims(calibration.tensors[plan[key]].numpy(), axis)
        delta = delta @ (np.eye(delta.shape[1]) - calibration.projectors[plan["site"]].numpy())
        assert change.after == pytest.approx(np.linalg.norm(delta), rel=1e-5)


def test_overlaps_are_those_of_dense_decompositions(
    found: TaskVectors, calibration: Calibration, trio: Trio
) -> None:
    weights = {role: trio.weights(role) for role in ("reasoning", "instruct", "pretrained")}
    for change in found.changes:
        name = tensor_name(change.module, change.layer, calibration)
        origin = weights["pretrained"][name].double().numpy()
        pairs = [
            np.linalg.svd(weights[role][name].double().numpy() - origin)
            for role in ("instruct", "reasoning")
        ]
        (ua, _, va), (ub, _, vb) = pairs
        assert change.overlap is not None
        left = np.linalg.norm(ua[:, :RANK].T @ ub[:, :RANK]) ** 2 / RANK
        right = np.linalg.norm(va[:RANK] @ vb[:RANK].T) ** 2 / RANK
        assert change.overlap.left == pytest.approx(left, abs=1e-4)
        assert change.overlap.right == pytest.approx(right, abs=1e-4)
        assert change.overlap.chance_right == pytest.approx(RANK / origin.shape[1])


def tensor_name(module: str, layer: int, calibration: Calibration) -> str:
    (name,) = (n for n in calibration.header["tensors"] if f".{layer}." in n and f".{module}." in n)
    return name


def test_large_matrices_are_decomposed_by_iteration() -> None:
    """A spectrum that falls slowly, wide and tall; the same each time."""
    for shape in ((600, 900), (900, 600)):
        factors = [torch.linalg.qr(torch.randn(size, 600)).Q for size in shape]
        matrix = factors[0] * (0.9 ** torch.arange(600.0)) @ factors[1].mT
        left, right = principal(matrix, 8)
        assert left.shape == (shape[0], 8)
        for found, exact in zip((left, right), factors, strict=True):
            shared = (found.mT @ exact[:, :8]).square().sum() / 8
            assert float(shared) == pytest.approx(1.0, abs=1e-4)
        assert torch.equal(principal(matrix, 8)[0], left)


def test_overlap_of_what_is_known() -> None:
    first = torch.diag(torch.tensor([4.0, 3.0, 2.0, 0.0]))
    other = torch.zeros(4, 4)
    other[0, 1], other[3, 3] = 5.0, 4.0  # output 0 is shared, input 1 too
    shared = overlap(first, other, 2)
    assert shared is not None
    assert (shared.left, shared.right) == (pytest.approx(0.5), pytest.approx(0.5))
    low = overlap(first, torch.outer(torch.eye(4)[0], torch.eye(4)[0]), 2)
    assert low is not None
    assert (low.left, low.chance_left) == (pytest.approx(1.0), 0.25)
    assert overlap(first, torch.zeros(4, 4), 2) is None


# Experts


def test_experts_are_means_over_a_layer(tmp_path: Path) -> None:
    """Stored one by one, and as one tensor in one of the three models: the same numbers."""
    tiny = architectures.make(tmp_path, "mixtral").using(coefficients="off")
    tiny.calibrate()
    file, read = CalibrationFile.open(str(tiny.path)), tiny.weights
    first = measure_task_vectors(file, opened(tmp_path), RANK)
    assert any(name.endswith("experts.3.w2.weight") for name in read("instruct"))
    assert any("Of the 4 experts of a layer the means are shown" in text for text in first.remarks)
    rows = {(change.module, change.layer): change for change in first.changes}
    assert len(rows) == len(first.changes)
    prefix = "model.layers.1.block_sparse_moe.experts"
    before, shared = [], []
    for expert in range(4):
        name = f"{prefix}.{expert}.w2.weight"
        weights = [read(role)[name].double() for role in ("instruct", "pretrained", "reasoning")]
        tuned, thinking = weights[0] - weights[1], weights[2] - weights[1]
        before.append(float(tuned.norm()))
        pairs = [np.linalg.svd(delta.numpy())[2][:RANK] for delta in (tuned, thinking)]
        shared.append(np.linalg.norm(pairs[0] @ pairs[1].T) ** 2 / RANK)
    experts = rows["experts.down_proj", 1]
    assert experts.before == pytest.approx(np.mean(before), rel=1e-5)
    assert experts.overlap is not None
    assert experts.overlap.right == pytest.approx(np.mean(shared), abs=1e-4)
    store_as_modules(tmp_path / "reasoning")
    mixed = measure_task_vectors(file, opened(tmp_path), RANK)
    assert [asdict(one) for one in mixed.changes] == [asdict(one) for one in first.changes]


def opened(folder: Path) -> dict[str, Checkpoint]:
    roles = ("reasoning", "instruct", "pretrained")
    return {role: open_checkpoint(str(folder / role), LoadOptions()) for role in roles}


# The page


def test_page_shows_task_vectors(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    succeed("report", path, "-o", out, "--subspace", 2)
    text = out.read_text(encoding="utf-8")
    for part in ("Task vectors", "2 strongest directions", "overlap, input side", "o_proj"):
        assert part in text
    assert "Not shown" not in text
    succeed("report", path, "-o", out, "--no-task-vectors")
    assert "switched off" in out.read_text(encoding="utf-8")


def test_page_with_task_vectors_in_a_browser(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    succeed("report", path, "-o", out, "--subspace", 2)
    browser.check([out.read_text(encoding="utf-8")], tmp_path / "browser")


def test_page_says_why_they_are_missing(tmp_path: Path) -> None:
    file = calibrations.write(tmp_path / "some.rain.safetensors", 2)
    out = tmp_path / "report.html"
    succeed("report", file, "-o", out)
    said = "Not shown: not a folder on this machine: org/reasoning (reasoning), org/instruct"
    assert said in out.read_text(encoding="utf-8")


def test_other_models_are_not_drawn(trio: Trio, tmp_path: Path) -> None:
    moved = Trio(*(tmp_path / name for name in ("reasoning", "instruct", "pretrained")))
    for role in ("reasoning", "instruct", "pretrained"):
        shutil.copytree(getattr(trio, role), getattr(moved, role))
    content: Any = make_calibration(moved)
    file = content.write(tmp_path / "some.rain.safetensors")
    shutil.copy(trio.reasoning / "model.safetensors", moved.instruct)
    out = tmp_path / "report.html"
    succeed("report", file, "-o", out)
    assert "another instruct model is there now" in out.read_text(encoding="utf-8")
    out.unlink()
    assert "another instruct" in refused(tmp_path, "report", file, "-o", out, "--task-vectors")
