"""What is said of a calibration that protects or merges less than its settings seem to ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import Tiny

from rain_mergekit.calibration.site_solver import SiteFeatures, solve_site
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.config.settings import RainSettings


@pytest.mark.parametrize(("most", "capped"), [(3, True), (12, False)])
def test_rank_cap_that_cuts_what_attention_reads_is_said(most: int, capped: bool) -> None:
    """The directions at the markers are two and fit; what is read has six more."""
    settings = RainSettings(
        reasoning_data="r",
        instruction_data="i",
        fit="projection",
        rank_by="full",
        projection="orthogonal",
    )
    basis = torch.linalg.qr(torch.randn(16, 8, dtype=torch.float64))[0]
    rows, read = basis[:, :2].mT.float(), basis.mT.float()
    delta = torch.eye(16)
    found = solve_site("site", SiteFeatures(rows, 2, None, [read]), [delta], settings, most)
    assert found.capped is capped
    assert found.rank == (3 if capped else 8)


def test_coefficients_of_nothing_are_a_warning(tmp_path: Path) -> None:
    """The closed form without a lower bound: attention to the instruction is a small number."""
    tiny = Tiny.make(tmp_path, "qwen2")
    settings = {"coefficients": "closed_form", "rho": 0.0, "alpha_max": 0.02}
    found = tiny.using("small.safetensors", alpha_min=0.0, **settings).calibrate()
    said = next(text for text in found.warnings if "the coefficients are" in text)
    assert "of the task vector" in said
    assert "damping" not in next(iter(CalibrationFile.open(found.path).header["sites"].values()))
    larger = {"coefficients": "closed_form", "alpha_min": 0.5, "alpha_max": 1.0}
    found = tiny.using("large.safetensors", **larger).calibrate()
    assert not any("the coefficients are" in text for text in found.warnings)
