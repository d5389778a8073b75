"""The measurement of what `ask` costs beside a bare client: both do the same requests."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.asking import Load, overheads
from benchmarks.slow_server import reply


def test_both_clients_do_all_requests(tmp_path: Path) -> None:
    load = Load(requests=6, parallel=3, seconds=0.01)
    found = overheads(load, tmp_path, rounds=2)
    assert len(found) == 2
    for number in range(2):
        lines = (tmp_path / f"3-{number}.jsonl").read_text().splitlines()[1:]
        assert {json.loads(line)["prompt"] for line in lines} == {
            f"What is {i} + 4?" for i in range(6)
        }
        assert all(json.loads(line)["tokens"] == 1200 for line in lines)


def test_answers_are_as_long_as_they_are_said_to_be() -> None:
    assert 4000 < len(reply("What is 0 + 4?")) < 5000
