"""The same inputs give the same file, bit for bit, whatever the run had to do on its way."""

from __future__ import annotations

import pytest
import torch
from tiny import Tiny

from rain_mergekit.artifact import CalibrationFile
from rain_mergekit.calibrate import RunOptions, calibrate


@pytest.fixture(scope="module", name="tiny")
def _tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    tiny = Tiny.make(tmp_path_factory.mktemp("same"), "qwen2")
    return tiny.using(coefficients="normalized", alpha_min=0.0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_budget": 0},
        {"activation_budget": 20_000},
        {"snapshot_seconds": 0},
        {"keep_on_device": True},
    ],
    ids=["again", "all on disk", "some on disk", "snapshots", "kept on the device"],
)
def test_same_bytes(tiny: Tiny, options: dict[str, int]) -> None:
    tiny.calibrate()
    expected = tiny.path.read_bytes()
    calibrate(tiny.config(), RunOptions(quiet=True, **options))  # type: ignore[arg-type]
    assert tiny.path.read_bytes() == expected


def test_threads_change_no_more_than_rounding(tiny: Tiny) -> None:
    """Which is why another number of threads is not promised to give the same bits."""
    projectors = []
    threads = torch.get_num_threads()
    for count in (1, 4):
        torch.set_num_threads(count)
        try:
            tiny.calibrate()
        finally:
            torch.set_num_threads(threads)
        file = CalibrationFile.open(tiny.path)
        factors = [file.factors(site) for site in file.sites]
        projectors.append([f.u @ f.v.mT for f in factors if f.u is not None and f.v is not None])
    for one, other in zip(*projectors, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
