"""RegMean as a graded projection, against dense solves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rain_mergekit.errors import RainError
from rain_mergekit.linalg.feature_rows import FeatureRows
from rain_mergekit.linalg.graded import graded


def rows_of(gram: Tensor) -> FeatureRows:
    """Rows with that second moment, by its eigenvalues."""
    values, vectors = torch.linalg.eigh(gram)
    return FeatureRows.of((vectors * values.clamp(min=0).sqrt()).mT.contiguous())


@pytest.mark.parametrize(
    ("strength", "wanted"),
    [
        (0.0, [[1.0, 2.0], [3.0, 4.0]]),
        (1.0, [[0.4, 0.8], [1.6, 1.2]]),
        (1e6, [[6.7e-7, 1.3333e-6], [0.6666682, -0.6666636]]),
    ],
)
def test_two_by_two(strength: float, wanted: list[list[float]]) -> None:
    """G_I = diag(2, 1), G_R all ones: by hand."""
    instruction = rows_of(torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64)))
    reasoning = rows_of(torch.ones(2, 2, dtype=torch.float64))
    found = graded(reasoning, instruction, strength, 1e-12)
    delta = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    merged = found.factors(torch.arange(len(found.ratios))).project(delta)
    torch.testing.assert_close(merged, torch.tensor(wanted).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("counts", [(5, 7), (30, 40), (30, 7), (5, 40)])
def test_is_the_dense_solution(counts: tuple[int, int]) -> None:
    torch.manual_seed(3)
    width, strength, epsilon = 12, 0.7, 1e-3
    reasoning, instruction = (torch.randn(count, width).double() for count in counts)
    found = graded(FeatureRows.of(reasoning), FeatureRows.of(instruction), strength, epsilon)
    g_r, g_i = reasoning.mT @ reasoning, instruction.mT @ instruction
    g_i += epsilon * g_i.trace() / width * torch.eye(width)
    delta = torch.randn(4, width).double()
    wanted = delta @ g_i @ torch.linalg.inv(g_i + strength * g_r)
    everything = torch.arange(len(found.ratios))
    torch.testing.assert_close(found.factors(everything).project(delta), wanted)

    def objective(change: Tensor) -> float:
        return float(torch.trace(change @ (g_i + strength * g_r) @ change.mT))

    # A direction's gain is what the objective ‖(D - Δ) X_I‖² + s ‖D X_R‖² falls by with it alone.
    gains = found.gains([delta])
    best = objective(delta - wanted)
    for index in (0, len(everything) // 2):
        alone = found.factors(everything[[index]]).project(delta)
        fell = objective(delta - wanted) - objective(alone - wanted)
        assert float(gains[index]) == pytest.approx(fell, rel=1e-8)
    assert float(gains.sum()) == pytest.approx(best, rel=1e-8)


def test_without_instruction_features_all_that_is_reasoned_with_is_protected() -> None:
    torch.manual_seed(4)
    reasoning = torch.randn(3, 8).double()
    found = graded(FeatureRows.of(reasoning), None, 1.0, 1e-8)
    delta = torch.randn(4, 8).double()
    change = found.factors(torch.arange(3)).project(delta)
    assert float((change @ reasoning.mT).norm()) < 1e-6 * float((delta @ reasoning.mT).norm())


def test_a_ridge_lost_in_rounding_is_named() -> None:
    torch.manual_seed(5)
    rows = torch.randn(40, 1).double() @ torch.randn(1, 8).double()
    with pytest.raises(RainError, match="epsilon = 1e-18 is lost in rounding"):
        graded(FeatureRows.of(rows), FeatureRows.of(rows), 1.0, 1e-18)
