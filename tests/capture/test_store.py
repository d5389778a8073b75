"""Hidden states in memory and on disk are the same hidden states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rain_mergekit.capture.activation_store import ActivationStore
from rain_mergekit.errors import RainError

WIDTH = 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def states(lengths: list[int], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(length, WIDTH).to(dtype) for length in lengths]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples_in_memory", [0, 1, 2, 3, 9])
def test_whatever_spills_comes_back_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, samples_in_memory: int
) -> None:
    lengths, path = [3, 3, 3], tmp_path / "x" / "spilled"
    size = 3 * WIDTH * dtype.itemsize
    store = ActivationStore(lengths, WIDTH, dtype, samples_in_memory * size, path)
    kept = min(samples_in_memory, 3)
    assert (store.memory_bytes, store.disk_bytes) == (kept * size, (3 - kept) * size)
    for _ in range(2):  # the second time in place
        expected = states(lengths, dtype)
        for index, hidden in enumerate(expected):
            store.put(index, hidden)
        assert all(torch.equal(store.get(i), hidden) for i, hidden in enumerate(expected))
        for tokens in ([2, 0], [1], []):
            at = torch.tensor(tokens, dtype=torch.long)
            found = [store.rows(i, at) for i in range(3)]
            assert all(torch.equal(one, h[at]) for one, h in zip(found, expected, strict=True))
    assert path.exists() == (kept < 3)
    if kept < 3:
        assert path.stat().st_size == store.disk_bytes
        assert path.stat().st_mode & 0o077 == 0
    store.close()
    assert not path.exists()
    store.close()


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(0, 500),
    st.sampled_from(DTYPES),
    st.randoms(use_true_random=False),
)
def test_samples_may_be_written_in_any_order(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    budget: int,
    dtype: torch.dtype,
    random: object,
) -> None:
    path = tmp_path_factory.mktemp("store") / "spilled"
    store = ActivationStore(lengths, WIDTH, dtype, budget, path)
    assert store.lengths == lengths
    assert store.memory_bytes <= budget
    expected, order = states(lengths, dtype), list(range(len(lengths)))
    random.shuffle(order)  # type: ignore[attr-defined]
    for index in order:
        store.put(index, expected[index])
    assert all(torch.equal(store.get(i), hidden) for i, hidden in enumerate(expected))
    store.close()
    assert not path.exists()


def test_what_the_budget_has_room_for_stays_on_the_device_and_the_rest_goes_to_disk(
    tmp_path: Path,
) -> None:
    """A device without numbers stands for a GPU: what is there cannot have come from a file."""
    elsewhere, path = torch.device("meta"), tmp_path / "spilled"
    expected = states([3, 3], torch.bfloat16)
    store = ActivationStore([3, 3], WIDTH, torch.bfloat16, expected[0].nbytes, path, elsewhere)
    for index, hidden in enumerate(expected):
        store.put(index, hidden)
    assert store.get(0).device == elsewhere
    assert torch.equal(store.get(1), expected[1])
    assert path.stat().st_size == expected[1].nbytes
    store.close()


def test_states_are_converted_and_freed_from_what_they_were_cut_from(tmp_path: Path) -> None:
    store = ActivationStore([2], WIDTH, torch.float32, 10**6, tmp_path / "spilled")
    big = torch.randn(100, WIDTH)
    store.put(0, big[:2])
    assert store.get(0).untyped_storage().nbytes() == 2 * WIDTH * 4
    store.put(0, torch.ones(2, WIDTH, dtype=torch.float64))
    assert store.get(0).dtype == torch.float32


def test_a_wrong_shape_is_a_programming_error(tmp_path: Path) -> None:
    store = ActivationStore([2], WIDTH, torch.float32, 10**6, tmp_path / "spilled")
    with pytest.raises(ValueError, match="sample 0"):
        store.put(0, torch.zeros(3, WIDTH))


def test_a_truncated_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "spilled"
    store = ActivationStore([2], WIDTH, torch.float32, 0, path)
    store.put(0, torch.zeros(2, WIDTH))
    with path.open("r+b") as file:
        file.truncate(8)
    with pytest.raises(RainError, match="truncated by another process"):
        store.get(0)
    store.close()


@pytest.mark.parametrize("budgets", [(0, 10**6), (10**6, 0), (40, 100)])
def test_a_snapshot_fits_any_budget(tmp_path: Path, budgets: tuple[int, int]) -> None:
    lengths = [2, 4, 1]
    first, second = (
        ActivationStore(lengths, WIDTH, torch.bfloat16, budget, tmp_path / f"{number}")
        for number, budget in enumerate(budgets)
    )
    expected = states(lengths, torch.bfloat16)
    for index, hidden in enumerate(expected):
        first.put(index, hidden)
    first.save(tmp_path / "snapshot")
    second.load(tmp_path / "snapshot")
    assert all(torch.equal(second.get(i), hidden) for i, hidden in enumerate(expected))
    with (tmp_path / "snapshot").open("r+b") as file:
        file.truncate(20)
    with pytest.raises(OSError, match="shorter than"):
        second.load(tmp_path / "snapshot")
    first.close()
    second.close()
