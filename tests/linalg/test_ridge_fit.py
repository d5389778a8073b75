"""Ridge regression of one site against normal equations and singular values as numpy has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from rain_mergekit.errors import RainError
from rain_mergekit.linalg.landmarks import LandmarkSums, evenly_by_weight, spanned
from rain_mergekit.linalg.ridge_fit import CANDIDATES, EPSILON, RidgeSums
from rain_mergekit.linalg.ridge_solver import LowRankChange

CPU = torch.device("cpu")
Array = NDArray[np.float64]
Tokens = tuple[Tensor, Tensor, Tensor]


def problem(tokens: int, width: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, width, generator=chance, dtype=torch.float64)
    inputs[:, 0] *= 30  # a massive activation
    errors = torch.randn(tokens, outputs, generator=chance, dtype=torch.float64)
    return inputs, errors, torch.rand(tokens, generator=chance, dtype=torch.float64) + 0.1


def dense(inputs: Tensor, errors: Tensor, weights: Tensor, epsilon: float) -> tuple[Array, Array]:
    """D and G + g I from the formula."""
    x, e, w = (t.numpy() for t in (inputs, errors, weights))
    gram = x.T @ np.diag(w) @ x
    system = gram + epsilon * np.trace(gram) / len(gram) * np.eye(len(gram))
    return e.T @ np.diag(w) @ x @ np.linalg.inv(system), system


def solve(
    kind: str,
    data: Tokens,
    epsilon: float | None,
    rank: int,
    share: float = 1.0,
    aside: Tokens | None = None,
) -> LowRankChange:
    outputs = {"w": data[1].shape[1]}
    sums: RidgeSums | LandmarkSums = (
        RidgeSums(data[0].shape[1], outputs, CPU, choose=epsilon is None)
        if kind == "sums"
        else LandmarkSums(spanned(data[0][: data[0].shape[1]]), outputs, choose=epsilon is None)
    )
    for tokens, apart in ((data, False), (aside, True)):
        if tokens is not None:
            inputs, errors, weights = tokens
            for part in torch.arange(len(inputs)).split(7):  # as texts come
                sums.add(inputs[part], {"w": errors[part]}, weights[part], aside=apart)
    return sums.changes(epsilon, rank, share)["w"]


SHAPES = [(60, 12, 7), (60, 7, 12), (9, 20, 6), (9, 20, 30)]


@pytest.mark.parametrize("kind", ["sums", "landmarks"])
@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_it_is_the_formula(kind: str, shape: tuple[int, int, int]) -> None:
    data = problem(*shape)
    expected, _ = dense(*data, 0.01)
    found = solve(kind, data, 0.01, 1000).matrix.numpy()
    assert np.linalg.norm(found - expected) < 1e-9 * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", ["sums", "landmarks"])
def test_rows_in_bfloat16_lose_no_more_than_their_own_rounding(kind: str) -> None:
    """Two massive activations that move together; a product rounded to 16 bits hides the rest."""
    inputs, errors, weights = problem(400, 24, 5)
    inputs[:, 0] *= 20
    inputs[:, 1] += inputs[:, 0]
    data = inputs.bfloat16(), errors.bfloat16(), weights
    expected, _ = dense(data[0].double(), data[1].double(), weights, 1e-4)
    found = solve(kind, data, 1e-4, 1000).matrix.numpy()
    assert np.linalg.norm(found - expected) < 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", ["sums", "landmarks"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_low_rank_is_the_best_one_in_the_metric(kind: str, shape: tuple[int, int, int]) -> None:
    """Eckart and Young: the best rank-r approximation of D (G + g I)^½, taken back."""
    data = problem(*shape)
    whole, system = dense(*data, 0.1)
    root = np.linalg.cholesky(system)
    u, s, v = np.linalg.svd(whole @ root, full_matrices=False)
    expected = (u[:, :3] * s[:3]) @ v[:3] @ np.linalg.inv(root)
    found = solve(kind, data, 0.1, 3)
    assert found.rank == 3
    assert np.linalg.norm(found.matrix.numpy() - expected) < 1e-7 * np.linalg.norm(expected)
    assert found.explained == pytest.approx(float((s[:3] ** 2).sum() / (s**2).sum()), rel=1e-6)


@pytest.mark.parametrize("kind", ["sums", "landmarks"])
def test_the_share_chooses_the_smallest_rank_that_keeps_it(kind: str) -> None:
    data = problem(60, 12, 7)
    whole, system = dense(*data, 0.1)
    energies = np.linalg.svd(whole @ np.linalg.cholesky(system), compute_uv=False) ** 2
    wanted = int((np.cumsum(energies) < 0.8 * energies.sum()).sum()) + 1
    found = solve(kind, data, 0.1, 1000, share=0.8)
    assert (found.rank, found.wanted) == (wanted, wanted)
    capped = solve(kind, data, 0.1, 2, share=0.8)
    assert (capped.rank, capped.wanted) == (2, wanted)


def test_what_fits_exactly_is_found_exactly() -> None:
    """Errors that a matrix makes, and hardly any penalty: that matrix, and all energy fitted."""
    inputs, _, weights = problem(60, 12, 7)
    matrix = torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = solve("sums", (inputs, inputs @ matrix.mT, weights), 1e-13, 1000)
    assert torch.allclose(found.matrix, matrix, atol=1e-6)
    assert found.fitted == pytest.approx(1.0, abs=1e-6)


@given(st.floats(1e-6, 10.0), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_both_forms_agree_and_no_change_of_that_rank_is_better(
    epsilon: float, rank: int, seed: int
) -> None:
    data = problem(25, 10, 8, seed)
    inputs, errors, weights = data
    one, other = (solve(kind, data, epsilon, rank) for kind in ("sums", "landmarks"))
    penalty = epsilon * float((weights[:, None] * inputs**2).sum()) / inputs.shape[1]

    def loss(change: Tensor) -> float:
        left = errors - inputs @ change.mT
        return float((weights[:, None] * left**2).sum() + penalty * (change**2).sum())

    assert loss(one.matrix) == pytest.approx(loss(other.matrix), rel=1e-6)
    chance = torch.Generator().manual_seed(seed)
    for _ in range(5):
        a, b = (
            t + 1e-3 * torch.randn(t.shape, generator=chance, dtype=t.dtype) for t in (one.a, one.b)
        )
        assert loss(one.matrix) <= loss(a @ b.mT) * (1 + 1e-9)


@pytest.mark.parametrize("kind", ["sums", "landmarks"])
@pytest.mark.parametrize("shape", [(60, 30, 7), (25, 40, 6)])
def test_epsilon_is_the_largest_that_removes_nearly_all_that_can_be_removed(
    kind: str, shape: tuple[int, int, int]
) -> None:
    tokens, width, outputs = shape
    inputs, _, weights = problem(2 * tokens, width, outputs, seed=3)
    chance = torch.Generator().manual_seed(4)
    true = torch.randn(outputs, width, generator=chance, dtype=torch.float64)
    for noise in (0.01, 30.0):
        errors = inputs @ true.mT
        errors += noise * torch.randn(errors.shape, generator=chance, dtype=torch.float64)
        data = inputs[:tokens], errors[:tokens], weights[:tokens]
        unseen = inputs[tokens:], errors[tokens:], weights[tokens:]
        found = solve(kind, data, None, 1000, aside=unseen)
        left = {}
        for epsilon in CANDIDATES:
            change, _ = dense(*data, epsilon)
            missed = unseen[1].numpy() - unseen[0].numpy() @ change.T
            left[epsilon] = float((unseen[2].numpy()[:, None] * missed**2).sum())
        without = float((unseen[2].numpy()[:, None] * unseen[1].numpy() ** 2).sum())
        removed = {epsilon: without - error for epsilon, error in left.items()}
        enough = 0.85 * max(removed.values())
        assert found.epsilon == max(value for value in removed if removed[value] >= enough)
        expected, _ = dense(*data, found.epsilon)
        assert np.linalg.norm(found.matrix.numpy() - expected) < 1e-8 * np.linalg.norm(expected)
    assert found.epsilon > min(CANDIDATES)  # much noise asks for a larger one


@pytest.mark.parametrize("kind", ["sums", "landmarks"])
def test_without_tokens_held_aside_epsilon_is_the_fixed_one(kind: str) -> None:
    data = problem(60, 12, 7)
    found, fixed = (solve(kind, data, value, 1000) for value in (None, EPSILON))
    assert found.epsilon == EPSILON
    assert torch.equal(found.matrix, fixed.matrix)


def test_no_errors_give_no_change() -> None:
    inputs, errors, weights = problem(20, 6, 4)
    found = solve("sums", (inputs, torch.zeros_like(errors), weights), 0.01, 1000)
    assert found.rank == 0
    assert torch.equal(found.matrix, torch.zeros(4, 6, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["sums", "landmarks"])
def test_inputs_of_zeros_are_told(kind: str) -> None:
    inputs, errors, weights = problem(20, 6, 4)
    with pytest.raises(RainError, match="all zero"):
        solve(kind, (torch.zeros_like(inputs), errors, weights), 0.01, 1000)


def test_within_landmarks_it_is_the_formula_on_their_directions() -> None:
    """argmin over D = M Qᵀ by the normal equations, with the penalty of the whole input."""
    data = problem(200, 40, 6)
    inputs, errors, weights = (t.numpy() for t in data)
    basis = np.linalg.svd(inputs[:15], full_matrices=False)[2].T  # of the same span
    inner = inputs @ basis
    energy = float((weights[:, None] * inner**2).sum()) / 40
    system = inner.T @ (weights[:, None] * inner) + 0.05 * energy * np.eye(15)
    expected = errors.T @ (weights[:, None] * inner) @ np.linalg.inv(system) @ basis.T
    sums = LandmarkSums(spanned(data[0][:15]), {"w": 6})
    sums.add(data[0], {"w": data[1]}, data[2])
    found = sums.changes(0.05, 1000, 1.0)["w"].matrix.numpy()
    assert np.linalg.norm(found - expected) < 1e-9 * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_repeat_span_what_there_is(dtype: torch.dtype) -> None:
    inputs, errors, weights = problem(60, 12, 5)
    inputs[:, 6:] = 0
    data = inputs.to(dtype), errors.to(dtype), weights
    sums = LandmarkSums(spanned(torch.cat([data[0][:6], data[0][:6]])), {"w": 5})
    sums.add(data[0], {"w": data[1]}, weights)
    expected, _ = dense(data[0].double(), data[1].double(), weights, 0.01)
    found = sums.changes(0.01, 1000, 1.0)["w"].matrix.numpy()
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


@given(st.integers(1, 60), st.integers(1, 30), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_landmarks_are_spread_by_weight(tokens: int, count: int, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    weights = torch.rand(tokens, generator=chance, dtype=torch.float64) ** 3 + 1e-3
    found = evenly_by_weight(weights, count)
    assert len(found) == len(set(found.tolist())) <= count
    assert len(found) >= min(tokens, 0.8 * count)
    if tokens > count:  # between two landmarks lies at most two steps of weight
        steps = weights.clamp(max=float(weights.sum()) / count)
        parts = [float(part.sum()) for part in torch.tensor_split(steps, found + 1)]
        assert max(parts) <= 2.5 * float(weights.sum()) / count
