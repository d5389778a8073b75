"""What is kept of many rows: sums of absolute values by channel."""

from __future__ import annotations

import torch

from rain_mergekit.linalg.row_collector import ChannelSums


def test_channel_sums_are_those_of_all_rows_at_once() -> None:
    rows = torch.randn(23, 5)
    found, other = ChannelSums(), ChannelSums()
    assert torch.equal(found.total(5), torch.zeros(5, dtype=torch.float64))
    found.add(rows[:7])
    other.add(rows[7:])
    found.put(*other.take(5, torch.device("cpu")))
    found.put(torch.ones(1, 5, dtype=torch.float64), 0)  # of no positions: nothing
    wanted = rows.double().abs().sum(0)
    assert found.count == 23
    torch.testing.assert_close(found.total(5), wanted, rtol=1e-12, atol=0)
