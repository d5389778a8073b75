"""Spectra, ranks and factors against numpy's SVD and explicitly formed float64 matrices."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rain_mergekit.linalg.feature_rows
from rain_mergekit.calibration.site_solver import SiteFeatures, solve_site, unconstrained
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.errors import RainError
from rain_mergekit.linalg import projection
from rain_mergekit.linalg.factors import Factors
from rain_mergekit.linalg.feature_rows import FeatureRows
from rain_mergekit.linalg.row_collector import Group, RowCollector, weighted_rows
from rain_mergekit.system.evenly_spaced import evenly_spaced

FEW = settings(max_examples=40)
shapes = st.tuples(st.integers(1, 24), st.integers(2, 16))
seeds = st.integers(0, 2**31 - 1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def options(**changes: object) -> RainSettings:
    base = {
        "reasoning_data": "r",
        "fit": "projection",
        "projection": "orthogonal",
        "coefficients": "off",
    }
    return RainSettings.model_validate({**base, **changes})


def residual(rows: Tensor, factors: Factors, delta: Tensor) -> float:
    """||Delta' H^T|| / ||Delta H^T|| with Delta' from explicit matrices."""
    keep = torch.eye(rows.shape[1], dtype=torch.float64) - factors.u @ factors.v.mT
    change = (delta @ keep @ rows.mT).norm()
    return float(change / (delta @ rows.mT).norm())


@pytest.mark.parametrize("count", [5, 12, 40])
def test_spectrum_equals_the_singular_values_of_a_dense_svd(count: int) -> None:
    rows = normal(count, 12)
    _, sigma, right = np.linalg.svd(rows.numpy(), full_matrices=False)
    found = projection.spectrum(rows)
    np.testing.assert_allclose(found.values.numpy(), sigma**2, rtol=1e-10)
    for index in range(len(sigma)):
        overlap = abs(float(found.vectors[:, index] @ torch.from_numpy(right[index])))
        assert overlap == pytest.approx(1.0, abs=1e-9)
    assert found.total == pytest.approx(float((sigma**2).sum()))


@FEW
@given(shapes, seeds, st.sampled_from([1e-30, 1e-12, 1.0, 1e12, 1e30]), st.integers(1, 8))
def test_the_basis_of_any_rank_and_scale_is_orthonormal_and_spans_the_rows(
    shape: tuple[int, int], seed: int, scale: float, rank: int
) -> None:
    count, width = shape
    rank = min(rank, count, width)
    rows = (normal(count, rank, seed=seed) @ normal(rank, width, seed=seed + 1)) * scale
    found = projection.spectrum(rows)
    assert 1 <= found.vectors.shape[1] <= rank
    gram = found.vectors.mT @ found.vectors
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), atol=1e-10, rtol=0)
    left = rows - rows @ found.vectors @ found.vectors.mT
    assert float(left.norm()) <= 1e-6 * float(rows.norm())
    assert bool((found.values[:-1] >= found.values[1:]).all())
    assert float(found.values.sum()) == pytest.approx(found.total, rel=1e-9)


@FEW
@given(st.integers(2, 20), seeds, st.floats(1e-15, 1e-6))
def test_nearly_parallel_rows_are_protected_up_to_float64(
    count: int, seed: int, distance: float
) -> None:
    line = normal(1, 10, seed=seed)
    rows = line + distance * normal(count, 10, seed=seed + 1)
    found = projection.spectrum(rows)
    delta = normal(7, 10, seed=seed + 2)
    factors = projection.orthogonal_factors(found.vectors)
    assert residual(rows, factors, delta) <= 1e-6
    assert bool(torch.isfinite(found.vectors).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_extremes_of_half_precision_are_ordinary_numbers(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    rows = torch.tensor(
        [[limits.max, 0, 0, 0], [0, limits.tiny, 0, 0], [0, 0, -limits.max, limits.max]],
        dtype=dtype,
    )
    collector = RowCollector()
    collector.add(rows)
    stored = collector.rows()
    assert stored is not None
    assert torch.equal(stored.dense(), rows.double())
    found = projection.spectrum(stored)
    assert bool(torch.isfinite(found.values).all())
    assert found.values[0] == pytest.approx(2 * float(limits.max) ** 2, rel=1e-9)


def test_zero_rows_and_no_rows_protect_nothing() -> None:
    for rows in (torch.zeros(3, 5), torch.zeros(0, 5)):
        found = projection.spectrum(rows)
        assert found.vectors.shape == (5, 0)
        assert found.values.shape == (0,)
    assert projection.orthonormal(torch.zeros(5, 0)).shape == (5, 0)


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
def test_rows_without_a_finite_energy_are_not_scaled(value: float) -> None:
    rows = FeatureRows.of(torch.full((2, 3), value))
    assert rows.near_unit() is rows


def test_a_zero_row_among_others_changes_nothing() -> None:
    rows = normal(3, 6)
    padded = torch.cat([rows, torch.zeros(2, 6)])
    one, two = projection.spectrum(rows), projection.spectrum(padded)
    torch.testing.assert_close(one.values, two.values)
    torch.testing.assert_close(one.vectors @ one.vectors.mT, two.vectors @ two.vectors.mT)


def test_a_single_row_gives_its_direction() -> None:
    row = normal(1, 9)
    found = projection.spectrum(row)
    torch.testing.assert_close(found.vectors[:, 0].abs(), (row / row.norm())[0].abs())
    assert float(found.values[0]) == pytest.approx(float(row.norm()) ** 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    rows = normal(3, 4)
    rows[1, 2] = bad
    with pytest.raises(RainError, match="NaN or Inf"):
        projection.spectrum(rows)
    with pytest.raises(RainError, match="NaN or Inf"):
        projection.oblique_factors(projection.spectrum(normal(2, 4)).vectors, rows, 0.1)


@FEW
@given(seeds, st.sampled_from(["response_energy", "energy"]), st.floats(0.3, 0.999))
def test_an_energy_cap_leaves_exactly_what_the_dropped_directions_explain(
    seed: int, rule: str, share: float
) -> None:
    rows, delta = normal(9, 14, seed=seed), normal(6, 14, seed=seed + 1)
    chosen = options(rank_by=rule, rank_share=share)
    result = solve_site("site", SiteFeatures(rows, 9), [delta], chosen, 100)
    _, sigma, right = np.linalg.svd(rows.numpy(), full_matrices=False)
    answers = sigma**2 * np.square(delta.numpy() @ right.T).sum(0)
    energy = sigma**2 if rule == "energy" else answers
    order = np.argsort(-energy)
    count = int(np.searchsorted(np.cumsum(energy[order]), share * energy.sum()) + 1)
    assert result.rank == count
    keep = torch.eye(14, dtype=torch.float64) - result.factors.u @ result.factors.v.mT
    left = float((delta @ keep @ rows.mT).square().sum())
    dropped = answers[order[count:]].sum()
    assert left == pytest.approx(dropped, rel=1e-6, abs=1e-12 * answers.sum())
    assert result.kept_response_energy == pytest.approx(1 - dropped / answers.sum(), abs=1e-6)
    kept = (sigma**2)[order[:count]].sum() / (sigma**2).sum()
    assert result.kept_energy == pytest.approx(kept, abs=1e-9)


def test_other_rank_rules_count_directions() -> None:
    rows = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5], dtype=torch.float64))[:4]
    delta = normal(3, 5)

    def rank(cap: int = 100, **changes: object) -> int:
        return solve_site("s", SiteFeatures(rows, 4), [delta], options(**changes), cap).rank

    assert rank(rank_by="full") == 4
    assert rank(rank_by="count", rank_count=3) == 3
    assert rank(rank_by="count", rank_count=30) == 4
    assert rank(rank_by="tolerance", rank_tolerance=0.2) == 3
    assert rank(rank_by="tolerance", rank_tolerance=0.25) == 2  # strictly above
    assert rank(rank_by="energy", rank_share=1.0) == 4
    assert rank(rank_by="energy", rank_share=64 / 85) == 1
    assert rank(cap=2, rank_by="full") == 2


def test_the_cap_is_reported_and_a_basis_of_the_whole_space_is_refused() -> None:
    rows, delta = normal(12, 6), normal(3, 6)
    capped = solve_site("s", SiteFeatures(rows, 12), [delta], options(rank_by="full"), 4)
    assert capped.capped
    assert capped.rank == 4
    with pytest.raises(RainError, match=r"here\.q: the protected basis fills all 6 directions"):
        solve_site("here.q", SiteFeatures(rows, 12), [delta], options(rank_by="full"), 96)


def test_response_energy_ignores_planted_outliers_and_raw_energy_does_not() -> None:
    """One feature and one token 1000 times larger, to both of which Delta hardly responds."""
    width, count = 40, 30
    signal = normal(count, 6, seed=1) @ normal(6, width, seed=2)
    rows = signal.clone()
    rows[:, 0] = 1000 * signal[:, 0].abs().mean()  # a massive dimension
    odd = normal(1, width, seed=3)[0]
    odd[0] = 0
    rows[7] = 1000 * odd / odd.norm() * signal[7].norm()  # a massive token
    delta = normal(20, width, seed=4)
    delta[:, 0] *= 1e-5
    delta -= 0.99999 * torch.outer(delta @ odd, odd) / odd.square().sum()
    others = [index for index in range(count) if index != 7]

    def left(rule: str) -> tuple[float, int]:
        chosen = options(rank_by=rule, rank_share=0.99)
        result = solve_site("s", SiteFeatures(rows, count), [delta], chosen, 100)
        return residual(rows[others], result.factors, delta), result.rank

    raw, raw_rank = left("energy")
    assert raw > 0.9
    assert raw_rank <= 2
    response, rank = left("response_energy")
    assert response < 0.11  # sqrt(1 - 0.99)
    assert rank <= 8


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_response_energy_has_no_range_of_scales(scale: float) -> None:
    found, delta = projection.spectrum(normal(4, 6)), normal(5, 6)
    expected = found.values * (delta @ found.vectors).square().sum(0)
    scaled = projection.response_energy(found, [delta * scale])
    torch.testing.assert_close(scaled / scale**2, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("count", [4, 11, 30])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_oblique_factors_equal_the_explicit_formula(count: int, scale: float) -> None:
    basis = projection.spectrum(normal(3, 11)).vectors
    features = normal(count, 11, seed=5) * scale
    found = projection.oblique_factors(basis, features, 0.1)
    moment = features.mT @ features / scale**2
    gamma = 0.1 * moment.trace() / 11
    metric = torch.linalg.inv(moment + gamma * torch.eye(11, dtype=torch.float64))
    expected = metric @ basis @ torch.linalg.inv(basis.mT @ metric @ basis)
    torch.testing.assert_close(found.u, basis)
    torch.testing.assert_close(found.v, expected, rtol=1e-7, atol=1e-9)
    identity = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(found.v.mT @ basis, identity, rtol=0, atol=1e-10)


@FEW
@given(seeds, st.floats(0.001, 10), st.floats(0.01, 10))
def test_no_other_projection_changes_instruction_features_less(
    seed: int, epsilon: float, size: float
) -> None:
    """Among all Delta' with Delta' U = 0 ours minimises tr(D (C + gamma I) D^T)."""
    basis = projection.spectrum(normal(3, 10, seed=seed)).vectors
    features, delta = normal(7, 10, seed=seed + 1), normal(4, 10, seed=seed + 2)
    factors = projection.oblique_factors(basis, features, epsilon)
    ours = factors.project(delta)
    torch.testing.assert_close(ours @ basis, torch.zeros(4, 3).double(), rtol=0, atol=1e-10)
    moment = features.mT @ features
    metric = moment + epsilon * moment.trace() / 10 * torch.eye(10, dtype=torch.float64)

    def cost(candidate: Tensor) -> float:
        change = candidate - delta
        return float((change @ metric @ change.mT).trace())

    orthogonal = projection.orthogonal_factors(basis).project(delta)
    assert cost(ours) <= cost(orthogonal) * (1 + 1e-12)
    for other in range(5):
        step = size * normal(4, 10, seed=seed + 10 + other)
        feasible = ours + step - step @ basis @ basis.mT
        assert cost(feasible) > cost(ours)


def test_without_instruction_features_the_oblique_projection_is_the_orthogonal_one() -> None:
    basis = projection.spectrum(normal(3, 10)).vectors
    factors = projection.oblique_factors(basis, torch.zeros(4, 10), 0.1)
    assert factors.v is factors.u


def test_a_regularisation_lost_in_rounding_is_refused() -> None:
    basis = projection.spectrum(normal(3, 10)).vectors
    features = normal(1, 10, seed=1).expand(20, 10)
    with pytest.raises(RainError, match="epsilon"):
        projection.oblique_factors(basis, features, 1e-300)


def test_stored_in_float32_the_oblique_projection_stays_exact_in_bad_geometry() -> None:
    """Instruction features almost parallel to the protected ones: V is as long as it gets."""
    rows = normal(20, 64)
    features = 1e3 * (rows[:10] + 1e-2 * normal(10, 64, seed=1))
    factors = projection.oblique_factors(projection.spectrum(rows).vectors, features, 0.1)
    stored = Factors(factors.u.float().double(), factors.v.float().double())
    assert residual(rows, stored, normal(30, 64, seed=2)) <= 1e-5


def test_a_soft_projection_damps_by_relative_energy() -> None:
    rows, delta = normal(4, 9), normal(5, 9)
    found = projection.spectrum(rows)
    result = solve_site(
        "s", SiteFeatures(rows, 4), [delta], options(rank_by="full", ridge=0.3), 100
    )
    damping = found.values / (found.values + 0.3 * found.values[0])
    soft = found.vectors @ torch.diag(damping) @ found.vectors.mT
    torch.testing.assert_close(result.factors.u @ result.factors.v.mT, soft)
    assert projection.ridge_weights(torch.zeros(0), 0.1).shape == (0,)


def test_a_soft_projection_damps_by_the_largest_of_the_chosen_directions() -> None:
    """A massive activation to which the task vector does not respond is not chosen."""
    rows, delta = torch.diag(torch.tensor([100.0, 2, 1]).double()), normal(4, 3)
    delta[:, 0] = 0
    chosen = options(rank_by="response_energy", rank_share=0.9999, ridge=0.5)
    result = solve_site("s", SiteFeatures(rows, 3), [delta], chosen, 3)
    # of energies 4 and 1: 4 / (4 + 0.5 * 4) and 1 / (1 + 0.5 * 4)
    expected = torch.diag(torch.tensor([0, 2 / 3, 1 / 3]).double())
    torch.testing.assert_close(result.factors.u @ result.factors.v.mT, expected)


def test_kept_energy_is_that_of_the_chosen_directions_alone() -> None:
    """What reading adds is not counted, as the page on the file says."""
    rows, delta, read = normal(6, 12), normal(4, 12, seed=1), normal(5, 12, seed=2)
    chosen = options(rank_by="count", rank_count=2, reading_share=0.9)
    bare = solve_site("s", SiteFeatures(rows, 6), [delta], chosen, 12)
    more = solve_site("s", SiteFeatures(rows, 6, None, [read]), [delta], chosen, 12)
    assert more.rank > bare.rank == 2
    assert more.kept_energy == bare.kept_energy < 1


def test_folding_many_rows_keeps_their_second_moment() -> None:
    collector, blocks = RowCollector(), [normal(n, 5, seed=n).float() for n in (3, 9, 30, 1, 40)]
    for block in blocks:
        collector.add(block)
    collector.add(torch.zeros(0, 5))
    stacked = torch.cat(blocks).double()
    stored = collector.rows()
    assert stored is not None
    kept = stored.dense()
    assert len(kept) <= 4 * 5
    assert collector.count == len(stacked)
    torch.testing.assert_close(kept.mT @ kept, stacked.mT @ stacked)


def test_collected_rows_do_not_alias_the_layer_input() -> None:
    collector, rows = RowCollector(), torch.ones(2, 3)
    collector.add(rows)
    rows.zero_()
    stored = collector.rows()
    assert stored is not None
    assert torch.equal(stored.dense(), torch.ones(2, 3).double())


def test_groups_are_weighted_means_of_second_moments() -> None:
    collectors = {name: RowCollector() for name in ("think", "content", "unused", "empty")}
    think, content = normal(3, 4).float(), normal(9, 4, seed=1).float()
    collectors["think"].add(think)
    collectors["content"].add(content)
    collectors["unused"].add(content)
    groups = [Group("think", 1.0), Group("content", 0.25), Group("unused", 0.0)]
    found = weighted_rows(collectors, [*groups, Group("empty", 1.0), Group("absent", 1.0)])
    assert found is not None
    rows = found.dense()
    parts = [(think.double(), 1.0), (content.double(), 0.25)]
    expected = sum(weight * part.mT @ part / len(part) for part, weight in parts)
    torch.testing.assert_close(rows.mT @ rows, expected)
    assert weighted_rows(collectors, [Group("absent", 1.0)]) is None


@given(st.integers(0, 60), st.integers(1, 20))
def test_spread_takes_evenly_distributed_positions(total: int, limit: int) -> None:
    chosen = evenly_spaced(range(total), limit)
    assert len(chosen) == min(total, limit)
    assert list(chosen) == sorted(set(chosen))
    if total > limit:
        gaps = [b - a for a, b in pairwise(chosen)]
        assert not gaps or max(gaps) - min(gaps) <= 1


# --- what attention reads ------------------------------------------------------------------------


def test_covered_leaves_no_more_than_allowed_with_the_fewest_directions() -> None:
    generator = torch.Generator().manual_seed(5)
    delta = torch.randn(9, 12, generator=generator, dtype=torch.float64)
    rows = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    rows *= torch.logspace(0, -2, 12)
    basis = torch.eye(12, dtype=torch.float64)[:, 3:5]

    def left(columns: torch.Tensor) -> float:
        rest = rows - rows @ columns @ columns.mT
        return float((delta @ rest.mT).square().sum() / (delta @ rows.mT).square().sum())

    whole = float((rows @ delta.mT).square().sum())
    found = projection.extend_basis(basis, rows, whole, [delta[:4], delta[4:]], 0.9, 12)[0]
    rank = found.shape[1]
    torch.testing.assert_close(found[:, :2], basis)
    torch.testing.assert_close(found.mT @ found, torch.eye(rank, dtype=torch.float64))
    assert rank > 2
    assert left(found) <= 0.1 < left(found[:, :-1])
    for room, cut in ((rank - 1, True), (rank, False), (12, False)):
        within, capped = projection.extend_basis(basis, rows, whole, [delta], 0.9, room)
        assert (within.shape[1], capped) == (min(rank, room), cut)
    assert projection.extend_basis(found, rows, whole, [delta], 0.9, 12)[0].shape[1] == rank


def test_covered_takes_the_directions_of_the_largest_response() -> None:
    """Not those of the largest features: here these are answered least."""
    scales = torch.logspace(0, -2, 12, dtype=torch.float64)
    rows, basis = normal(40, 12, seed=1) * scales, torch.eye(12, dtype=torch.float64)[:, :2]
    delta = normal(9, 12, seed=2) / scales**1.5
    rest = (rows - rows @ basis @ basis.mT).numpy()
    _, sigma, right = np.linalg.svd(rest, full_matrices=False)
    energies = -np.sort(-(sigma**2) * np.square(delta.numpy() @ right.T).sum(0))
    whole = float((rows @ delta.mT).square().sum())
    for share in (0.3, 0.6, 0.9, 0.99):
        left = energies.sum() - np.concatenate([[0], np.cumsum(energies)])
        fewest = int(np.argmax(left <= (1 - share) * whole))
        found = projection.extend_basis(basis, rows, whole, [delta], share, 12)[0]
        assert found.shape[1] == 2 + fewest


def test_nothing_is_covered_that_no_task_vector_answers() -> None:
    basis = torch.eye(12, dtype=torch.float64)[:, :2]
    found = projection.extend_basis(basis, normal(9, 12), 0.0, [torch.zeros(3, 12)], 0.9, 12)[0]
    assert torch.equal(found, basis)


SCALES = st.sampled_from([1e-30, 1e-12, 1.0, 1e12, 1e30])


@FEW
@given(shapes, seeds, SCALES, SCALES, st.integers(1, 8), st.floats(0.5, 0.999))
def test_covered_of_any_rank_and_scale(
    shape: tuple[int, int], seed: int, scale: float, strength: float, rank: int, share: float
) -> None:
    """Single rows, rank-deficient ones, tiny and huge ones: as much stays uncovered as allowed."""
    count, width = shape
    rank = min(rank, count, width)
    rows = normal(count, rank, seed=seed) @ normal(rank, width, seed=seed + 1)
    delta = normal(5, width, seed=seed + 2)
    result = solve_site(
        "site",
        SiteFeatures(normal(1, width, seed=seed + 3), 1, None, [rows * scale]),
        [delta * strength],
        options(rank_by="count", rank_count=1, reading_share=share),
        width,
    )
    u = result.factors.u
    torch.testing.assert_close(u.mT @ u, torch.eye(u.shape[1], dtype=torch.float64))
    left = float((delta @ (rows - rows @ u @ u.mT).mT).square().sum())
    if u.shape[1] < width - 1:  # there was room
        assert left <= (1 - share + 1e-6) * float((delta @ rows.mT).square().sum())
        assert u.shape[1] <= 1 + rank


def test_nothing_to_read_adds_nothing() -> None:
    basis = projection.spectrum(normal(2, 6)).vectors
    delta = normal(4, 6)
    for rows in (torch.zeros(3, 6).double(), torch.zeros(0, 6).double(), basis.mT * 1e30):
        whole = float((delta @ rows.mT).square().sum())
        found = projection.extend_basis(basis, rows, whole, [delta], 0.9, 5)[0]
        assert found.shape == (6, 2)
        torch.testing.assert_close(found, basis)


@FEW
@given(st.integers(2, 20), seeds, st.floats(1e-15, 1e-6))
def test_nearly_parallel_rows_are_covered_by_their_line(
    count: int, seed: int, distance: float
) -> None:
    line = normal(1, 10, seed=seed)
    rows = line + distance * normal(count, 10, seed=seed + 1)
    delta = normal(7, 10, seed=seed + 2)
    whole = float((delta @ rows.mT).square().sum())
    basis = torch.zeros(10, 0, dtype=torch.float64)
    found = projection.extend_basis(basis, rows, whole, [delta], 0.9, 9)[0]
    assert found.shape[1] == 1
    assert float((found.mT @ line.mT).abs()) == pytest.approx(float(line.norm()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_extremes_of_half_precision_are_covered(dtype: torch.dtype) -> None:
    """The largest numbers of the type: their response is beyond float32."""
    rows = torch.zeros(2, 6, dtype=dtype)
    rows[0, 1] = rows[1, 2] = torch.finfo(dtype).max
    chosen = options(rank_by="count", rank_count=1, reading_share=0.9)
    other = torch.eye(6)[:1]
    result = solve_site("site", SiteFeatures(other, 1, None, [rows]), [torch.eye(6) * 9], chosen, 5)
    space = result.factors.u @ result.factors.u.mT
    torch.testing.assert_close(space, torch.diag(torch.tensor([1.0, 1, 1, 0, 0, 0])).double())


def test_the_task_vectors_are_read_once_and_once_more_for_each_group_that_is_read() -> None:
    class Reads:
        count = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.count += 1
            return iter([normal(4, 12), normal(3, 12, seed=1)])

    rows, deltas = normal(9, 12, seed=2), Reads()
    groups = [normal(30, 12, seed=seed) for seed in (3, 4)]
    solve_site("site", SiteFeatures(rows, 9), deltas, options(), 6)
    assert deltas.count == 1
    solve_site("site", SiteFeatures(rows, 9, None, groups), deltas, options(), 6)
    assert deltas.count == 1 + 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 8 * 7 * 3, 2**20])  # a row, three rows, all rows at once
def test_rows_are_multiplied_in_parts_of_any_size(
    monkeypatch: pytest.MonkeyPatch, size: int, dtype: torch.dtype
) -> None:
    for name in ("BLOCK_BYTES", "RESPONSE_BYTES"):
        monkeypatch.setattr(rain_mergekit.linalg.feature_rows, name, size)
    blocks = tuple(normal(count, 7, seed=count).to(dtype) for count in (5, 1, 8))
    weights = (0.5, 3.0, 0.1)
    rows = FeatureRows(blocks, weights)
    dense = torch.cat([b.double() * w for b, w in zip(blocks, weights, strict=True)])
    assert torch.equal(rows.dense(), dense)
    left, right = normal(14, 3), normal(7, 3)
    for found, expected in (
        (rows.gram().tril(), (dense.mT @ dense).tril()),
        (rows.outer().tril(), (dense @ dense.mT).tril()),
        (rows.times(right), dense @ right),
        (rows.transposed_times(left), dense.mT @ left),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        rows.responses(right.mT), (dense @ right).mT.float(), rtol=1e-5, atol=1e-5
    )


# What none of the comparisons above would notice


@pytest.mark.parametrize("count", [3, 40])  # through either side of the Gram matrix
def test_response_energy_sums_over_the_modules(count: int) -> None:
    rows = normal(count, 8) * torch.logspace(0, -2, 8, dtype=torch.float64)
    deltas = [normal(5, 8, seed=seed) for seed in (1, 2, 3)]
    found = projection.spectrum(rows)
    energy = projection.response_energy(found, deltas)
    moment = rows.mT @ rows
    for place, vector in enumerate(found.vectors.mT):
        wanted = sum(float((delta @ vector).square().sum()) for delta in deltas)
        wanted *= float(vector @ moment @ vector)
        assert float(energy[place]) == pytest.approx(wanted, rel=1e-4)


def test_the_cutoff_is_relative_to_the_largest_value_and_the_longer_side() -> None:
    eps = torch.finfo(torch.float64).eps
    for values in ([4.0], [1.0, 4.0, 2.0]):
        tensor = torch.tensor(values, dtype=torch.float64)
        assert projection.rank_cutoff(tensor, 3, 7) == 4.0 * 7 * eps
        assert projection.rank_cutoff(tensor, 9, 7) == 4.0 * 9 * eps
    assert projection.rank_cutoff(torch.empty(0), 3, 7) == 0.0


def test_the_empty_spectrum_is_a_spectrum() -> None:
    found = projection.spectrum(torch.zeros(4, 6))
    assert (found.total, found.width) == (0.0, 6)
    assert found.values.dtype == found.vectors.dtype == torch.float64
    assert (found.values.shape, found.vectors.shape) == ((0,), (6, 0))
    assert projection.spectrum(torch.zeros(4, 1)).values.shape == (0,)


@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize("count", [1, 3])
def test_orthonormal_keeps_order_and_signs(count: int, scale: float) -> None:
    wanted = torch.linalg.qr(normal(9, count))[0]
    wanted *= torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64)[:count]
    found = projection.orthonormal(wanted * scale + 1e-9 * normal(9, count, seed=1))
    torch.testing.assert_close(found, wanted, atol=1e-8, rtol=0)
    eye = torch.eye(count, dtype=torch.float64)
    torch.testing.assert_close(found.mT @ found, eye, atol=1e-14, rtol=0)


def test_counts_at_their_ends() -> None:
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)  # a sum of exactly one
    assert [projection.count_for_share(half, share) for share in (0.4, 0.5, 0.6, 1.0)] == [
        1,
        1,
        2,
        2,
    ]
    assert projection.count_for_share(torch.zeros(3), 0.5) == 0
    assert projection.count_above(torch.tensor([4.0]), 0.5) == 1
    assert projection.count_above(torch.empty(0), 0.5) == 0


def test_one_direction_is_projected_obliquely_and_none_or_no_features_orthogonally() -> None:
    rows, basis = normal(12, 5), torch.linalg.qr(normal(5, 1, seed=1))[0]
    found = projection.oblique_factors(basis.float(), rows, 0.1)
    moment = rows.mT @ rows
    metric = torch.linalg.inv(moment + 0.1 * moment.trace() / 5 * torch.eye(5))
    u = basis.float().double()
    torch.testing.assert_close(found.v, metric @ u @ torch.linalg.inv(u.mT @ metric @ u))
    plain = projection.oblique_factors(basis, torch.zeros(3, 5), 0.1)
    assert torch.equal(plain.u, basis)
    assert plain.v is plain.u


def test_a_task_vector_keeps_its_type() -> None:
    basis = torch.linalg.qr(normal(6, 2))[0]
    delta = normal(4, 6, seed=1).float()
    found = projection.orthogonal_factors(basis).project(delta)
    assert found.dtype == torch.float32
    wanted = delta.double() @ (torch.eye(6, dtype=torch.float64) - basis @ basis.mT)
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=0)


def test_rows_of_another_process_count_as_ones_own() -> None:
    """What one collector gave away, another takes up: Gram matrix and count stay."""
    own, other, together = RowCollector(), RowCollector(), RowCollector()
    for collector, rows in ((own, normal(4, 5, seed=1)), (other, normal(40, 5, seed=2))):
        collector.add(rows.float())
        together.add(rows.float())
    own.put(*other.take(5, torch.device("cpu")))
    assert (own.count, other.count, other.rows()) == (44, 0, None)
    assert RowCollector().take(5, torch.device("cpu"))[0].shape == (0, 5)
    found, whole = (c.take(5, torch.device("cpu"))[0] for c in (own, together))
    torch.testing.assert_close(found.T @ found, whole.T @ whole)


def test_without_rows_nothing_is_projected() -> None:
    site = unconstrained(5)
    assert (site.rank, site.capped) == (0, False)
    delta = normal(2, 5, seed=1).double()
    assert torch.equal(site.factors.project(delta), delta)


def test_messages_in_full() -> None:
    basis, bad = projection.spectrum(normal(3, 10)).vectors, torch.full((2, 10), torch.inf)
    with pytest.raises(RainError) as caught:
        projection.spectrum(bad)
    assert str(caught.value) == "features contain NaN or Inf"
    with pytest.raises(RainError) as caught:
        projection.oblique_factors(basis, bad, 0.1)
    assert str(caught.value) == "instruction features contain NaN or Inf"
    with pytest.raises(RainError) as caught:
        projection.oblique_factors(basis, normal(1, 10, seed=1).expand(20, 10), 1e-300)
    assert str(caught.value) == (
        "epsilon = 1e-300 is lost in rounding, so C_I + gamma I cannot be inverted; "
        "use a larger `epsilon` (0.1 is the default)"
    )
