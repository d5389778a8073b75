"""Eqs. 9-15 against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rain_mergekit.capture.attention_statistics import AttentionStatistics
from rain_mergekit.errors import RainError
from rain_mergekit.linalg import coefficients
from rain_mergekit.linalg.coefficients import HeadAccumulator, HeadStatistics
from rain_mergekit.models.attention import AttentionCall
from rain_mergekit.text.token_positions import InstructionTokens, SpanPositions

masses = st.lists(st.floats(0, 1), min_size=2, max_size=6)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sample(*spans: SpanPositions, thinking: tuple[int, ...] = ()) -> InstructionTokens:
    return InstructionTokens("here:1", tuple(range(12)), (), thinking, (8, 9, 10, 11), spans)


def causal(heads: int, kv_heads: int, length: int) -> tuple[AttentionCall, Tensor]:
    """An attention call, and its probabilities from an explicit double loop."""
    query = torch.randn(1, heads, length, 5)
    key = torch.randn(1, kv_heads, length, 5)
    probabilities = torch.zeros(heads, length, length, dtype=torch.float64)
    for head in range(heads):
        for row in range(length):
            scores = [
                float(query[0, head, row] @ key[0, head // (heads // kv_heads), column]) * 0.3
                for column in range(row + 1)
            ]
            probabilities[head, row, : row + 1] = torch.tensor(scores).double().softmax(0)
    call = AttentionCall(torch.nn.Identity(), query, key, None, 0.3, None, None, query.shape[-1])
    return call, probabilities


@given(masses, st.floats(0, 5))
def test_the_closed_form_is_gain_over_curvature(values: list[float], rho: float) -> None:
    alignment, leakage = vector(*values), vector(*values[::-1])
    statistics = HeadStatistics(alignment, leakage)
    found = coefficients.closed_form(statistics, rho).tolist()
    for alpha, a, u in zip(found, values, values[::-1], strict=True):
        assert alpha == pytest.approx((a - rho * u) / (1 + u), abs=1e-12)
        # the minimum of the quadratic that Eq. 13 asks for: 1/2 H alpha^2 - g alpha
        gradient = (1 + u) * alpha - (a - rho * u)
        assert gradient == pytest.approx(0, abs=1e-9)


def test_clipping_keeps_to_the_bounds() -> None:
    clipped = coefficients.clip(vector(-1, 0.2, 0.7, 9), 0.5, 1.5)
    assert clipped.tolist() == [0.5, 0.5, 0.7, 1.5]


def test_normalised_coefficients_have_mean_one_before_clipping() -> None:
    layers = [vector(0.02, 0.04), vector(0.06, 0.08)]
    first, second = coefficients.normalised(layers, 0.0, 10.0)
    torch.testing.assert_close(torch.cat([first, second]), vector(0.4, 0.8, 1.2, 1.6))
    first, second = coefficients.normalised(layers, 0.5, 1.5)
    torch.testing.assert_close(torch.cat([first, second]), vector(0.5, 0.8, 1.2, 1.5))


def test_a_head_that_leaks_more_than_it_follows_ends_at_the_lower_bound() -> None:
    layers = coefficients.normalised([vector(-0.5, 0.1), vector(0.1, 0.1)], 0.5, 9.0)
    assert layers[0][0] == 0.5
    # the mean is of the positive parts: 0.3 / 4
    torch.testing.assert_close(layers[1], vector(4 / 3, 4 / 3))


@pytest.mark.parametrize("values", [(0.0, 0.0), (-0.1, -0.2)])
def test_without_a_positive_head_the_normalised_scale_is_refused(values: tuple[float]) -> None:
    with pytest.raises(RainError, match=r"no head follows .* `coefficients: off`"):
        coefficients.normalised([vector(*values)], 0.5, 1.5)


def test_the_accumulator_means_over_samples_and_refuses_none() -> None:
    accumulator = HeadAccumulator(2)
    with pytest.raises(RainError, match="no instruction sample"):
        accumulator.result()
    accumulator.add(vector(0.1, 0.2), vector(0, 0.4))
    accumulator.add(vector(0.3, 0.2), vector(0, 0.2))
    statistics = accumulator.result()
    torch.testing.assert_close(statistics.alignment, vector(0.2, 0.2))
    torch.testing.assert_close(statistics.leakage, vector(0, 0.3))


def test_heads_expand_to_blocks_of_rows() -> None:
    alpha = vector(1, 2, 3, 4, 5, 6)
    assert coefficients.expand_query(alpha, 2).tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    # heads 0-2 share the first KV head, 3-5 the second (h // 3), each block occurs once
    assert coefficients.expand_key_value(alpha, 2, 2).tolist() == [2, 2, 5, 5]
    assert coefficients.expand_key_value(alpha, 6, 1).tolist() == alpha.tolist()
    assert coefficients.expand_key_value(alpha, 1, 3).tolist() == [3.5] * 3


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_span_statistics_equal_explicit_sums(heads: int, kv_heads: int) -> None:
    call, probabilities = causal(heads, kv_heads, 12)
    spans = (
        SpanPositions("one", (1, 2, 3), (8, 10), (9, 11)),
        SpanPositions("two", (5,), (11,), ()),
    )
    probe = AttentionStatistics(sample(*spans), leakage_from_thinking=False)
    probe(call)
    alignment, leakage = torch.zeros(heads).double(), torch.zeros(heads).double()
    for head in range(heads):
        grid = probabilities[head]
        one = (grid[8, 1:4].sum() + grid[10, 1:4].sum()) / 2
        alignment[head] = (one + grid[11, 5]) / 2
        # the second instruction has no unrelated token: it counts as 0
        leakage[head] = ((grid[9, 1:4].sum() + grid[11, 1:4].sum()) / 2 + 0) / 2
    assert probe.alignment is not None
    assert probe.leakage is not None
    torch.testing.assert_close(probe.alignment, alignment, rtol=0, atol=1e-6)
    torch.testing.assert_close(probe.leakage, leakage, rtol=0, atol=1e-6)


def test_the_thinking_can_count_as_unrelated() -> None:
    call, probabilities = causal(2, 2, 12)
    span = SpanPositions("one", (1, 2), (8,), (9,))
    probe = AttentionStatistics(sample(span, thinking=(4, 5)), leakage_from_thinking=True)
    probe(call)
    rows = probabilities[:, [4, 5, 9]][:, :, 1:3].sum(-1)
    assert probe.leakage is not None
    torch.testing.assert_close(probe.leakage, rows.mean(1), rtol=0, atol=1e-6)


def test_small_blocks_give_the_same_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    call, _ = causal(4, 2, 12)
    span = SpanPositions("one", (1, 2), (8, 9, 10), (11,))
    whole, parts = (
        AttentionStatistics(sample(span), leakage_from_thinking=False) for _ in range(2)
    )
    whole(call)
    monkeypatch.setattr("rain_mergekit.models.attention.BLOCK_BYTES", 1)
    parts(call)
    assert whole.alignment is not None
    assert parts.alignment is not None
    torch.testing.assert_close(whole.alignment, parts.alignment, rtol=0, atol=1e-7)


def test_sums_of_several_processes_replace_those_of_one() -> None:
    found = HeadAccumulator(2)
    for alignment, leakage in ((vector(0.25, 0.5), vector(0.125, 0.0)),) * 3:
        found.add(alignment, leakage)
    seen: list[Tensor] = []

    def total(part: Tensor) -> Tensor:
        """As if another process had added one sample with other masses."""
        seen.append(part.clone())
        return part + vector(0.25, 0.0, 0.5, 1.0, 1.0)

    summed = found.summed(total)
    assert torch.equal(seen[0], vector(0.75, 1.5, 0.375, 0.0, 3.0))
    assert seen[0].dtype == torch.float64
    assert summed.samples == 4
    assert torch.equal(summed.result().alignment, vector(0.25, 0.375))
    assert torch.equal(summed.result().leakage, vector(0.21875, 0.25))


def test_a_mask_of_any_type_chooses_the_instruction() -> None:
    rows = torch.tensor([[[0.1, 0.2, 0.3, 0.4]]])
    for mask in (torch.tensor([0, 1, 1, 0]), torch.tensor([False, True, True, False])):
        assert float(coefficients.span_masses(rows, mask)) == pytest.approx(0.5)


def test_messages_in_full() -> None:
    with pytest.raises(RainError) as caught:
        HeadAccumulator(1).result()
    assert str(caught.value) == "no instruction sample gave an attention statistic"
    with pytest.raises(RainError) as caught:
        coefficients.normalised([vector(-1.0)], 0.5, 1.5)
    assert str(caught.value) == (
        "no head follows the instructions more than it leaks to unrelated text; check the "
        "spans of the instruction data, lower `rho`, or set `coefficients: off`"
    )


def test_sums_of_several_processes_count_any_number_of_samples() -> None:
    """More than float32 counts to."""
    found = HeadAccumulator(1)
    found.samples = 2**24 + 1
    assert found.summed(lambda part: part).samples == 2**24 + 1
