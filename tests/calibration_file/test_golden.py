"""Files of every format version, kept as they were written then, are read for ever.

A golden file is never written anew: a new format version adds one.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.schema import VERSION
from rain_mergekit.linalg.merged_weight import changed_experts, changed_weight, merged_weight
from rain_mergekit.merge_method.rain import RainMerge

GOLDEN = Path(__file__).parent / "golden"
DIGESTS = {
    1: "d54005c67c40882e528167165c2f3b164d68440d28e0ba161223e564589eac75",
    2: "e5fb0ef7fb5baca28683baefbf84b05669766b5033467b9b0b3967e654e18c15",
    3: "d76b023ef7afb0bbd78722276b933863c54338f62be9e642bcceb17ea50c40e2",
    4: "b82ea5c390c8553d79a08dacbb33650687ec6a635c3ab02be65435ec78eaa749",
    5: "f589e69f1035da41834fdeb19dd91afeddc77f544f172523a46e4343df59a8b2",
    6: "14cce96cae6b2b67dfd3585cbbc6ff556d0eae35c286062ea1732eee12d76c1f",
}
SITE = "model.layers.0.self_attn.q_proj"
OUTPUT = "model.layers.0.self_attn.o_proj.weight"


def opened(version: int) -> CalibrationFile:
    return CalibrationFile.open(GOLDEN / f"v{version}.rain.safetensors")


def test_there_is_one_of_each_version() -> None:
    assert sorted(DIGESTS) == list(range(1, VERSION + 1))
    for version, expected in DIGESTS.items():
        data = (GOLDEN / f"v{version}.rain.safetensors").read_bytes()
        assert hashlib.sha256(data).hexdigest() == expected, "golden files do not change"


@pytest.mark.parametrize("version", DIGESTS)
def test_its_plans_are_read(version: int) -> None:
    file = opened(version)
    file.verify()
    assert {role: record.reference for role, record in file.models.items()} == {
        role: f"org/{role}" for role in ("reasoning", "instruct", "pretrained")
    }
    site = file.sites[SITE]
    assert (site.width, site.rank, site.kept_energy, site.positions) == (4, 1, 0.5, 7)
    plan = file.tensors[f"{SITE}.weight"]
    assert (plan.site, plan.shape, plan.input_axis, plan.cols) == (SITE, (3, 4), -1, None)
    assert file.tensors[OUTPUT].site is None
    assert file.header["warnings"] == ["careful"]


@pytest.mark.parametrize("version", DIGESTS)
def test_version_3_says_which_method_it_is_for(version: int) -> None:
    assert opened(version).kind == ("regmean" if version == 3 else "rain")


def test_a_change_of_version_2_is_added() -> None:
    """W = 1 everywhere, A = (1, 2, -1), B = (1, 0, 1/2, 2), strength 2: by hand."""
    file = opened(2)
    plan = file.tensors["model.layers.0.mlp.up_proj.weight"]
    added = file.change(plan)
    assert added is not None
    assert not plan.projected
    row = torch.tensor([2.0, 0.0, 1.0, 4.0])
    expected = 1 + torch.stack([row, 2 * row, -row])
    assert torch.equal(changed_weight(torch.ones(3, 4), added, 2.0), expected)
    assert torch.equal(changed_weight(torch.ones(4, 3), added, 2.0, -2), expected.mT)


def test_experts_of_version_5_take_each_their_own_change() -> None:
    """W = 1 everywhere, ranks 1 and 2, A and B by hand in columns, strength 2."""
    file = opened(5)
    plan = file.tensors["model.layers.0.mlp.experts.gate_up_proj"]
    added = file.change(plan)
    assert added is not None
    assert plan.ranks == (1, 2)
    row = torch.tensor([2.0, 0.0, 1.0, 4.0])
    first = 1 + torch.stack([row, 2 * row, -row])
    one, two = torch.tensor([2.0, 0.0, 0.0, 0.0]), torch.tensor([0.0, 4.0, 0.0, 0.0])
    expected = torch.stack([first, 1 + torch.stack([one, two, torch.zeros(4)])])
    assert torch.equal(changed_experts(torch.ones(2, 3, 4), added, plan.ranks, 2.0), expected)
    turned = changed_experts(torch.ones(2, 4, 3), added, plan.ranks, 2.0, -2)
    assert torch.equal(turned, expected.mT)


def test_weights_of_version_6_start_between_the_models() -> None:
    """W_R = 1, W_I = 3, a quarter of the way and twice the change of version 2; or half of it."""
    file, method = opened(6), RainMerge()
    weights = torch.ones(3, 4), torch.full((3, 4), 3.0), torch.full((3, 4), 7.0)
    plans = [file.tensors[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("up", "gate")]
    assert [(plan.start, plan.projected) for plan in plans] == [(0.25, False), (0.5, False)]
    row = torch.tensor([2.0, 0.0, 1.0, 4.0])
    changed, alone = (method.merged(file, plan, weights, 2.0) for plan in plans)
    assert torch.equal(changed, 1 + 2 * 0.25 * 2 + torch.stack([row, 2 * row, -row]))
    assert torch.equal(alone, torch.full((3, 4), 1 + 2 * 0.5 * 2.0))


@pytest.mark.parametrize("version", DIGESTS)
def test_version_4_takes_from_the_task_vector(version: int) -> None:
    assert opened(version).gamma == (0.25 if version == 4 else 0.0)


@pytest.mark.parametrize("version", DIGESTS)
def test_it_merges_to_the_same_numbers(version: int) -> None:
    """Δ = (1 2 3 4) in each row, U = e₁, V = e₁ + e₂/2, row scales 1, 2, 1/2: by hand."""
    file = opened(version)
    delta = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).expand(3, 4)
    plan = file.tensors[f"{SITE}.weight"]
    factors, rows = file.factors(str(plan.site)), file.scale(plan.rows)
    zero = torch.zeros(3, 4)
    merged = merged_weight((zero, delta, zero), factors, (rows, file.scale(plan.cols)), 2.0)
    row = torch.tensor([0.0, 3.0, 6.0, 8.0])
    assert torch.equal(merged, torch.stack([row, 2 * row, row / 2]))
    other = file.tensors[OUTPUT]
    cols = file.scale(other.cols)
    assert cols is not None
    assert cols.tolist() == [1.0, 2.0, 0.5]
