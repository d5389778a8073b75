"""Large tensors of experts stay as they are stored: no layer has all of them in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make
from safetensors.torch import load_file, save_file
from tiny import Tiny

from rain_mergekit.calibration import layer, layer_passes
from rain_mergekit.models import experts

ROLES = ("reasoning", "instruct", "pretrained")


def stored_as(tiny: Tiny, dtype: torch.dtype) -> None:
    """Rewrite the three models with the same values, which bfloat16 can hold, in this type."""
    for role in ROLES:
        path = tiny.folder / role / "model.safetensors"
        weights = {name: value.bfloat16().to(dtype) for name, value in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("fit", ["streams", "projection"])
def test_no_layer_holds_its_experts_in_float32_and_no_bit_changes(
    tmp_path: Path, family: str, fit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make(tmp_path, family).using("whole.rain.safetensors", fit=fit)
    stored_as(tiny, torch.float32)
    tiny.calibrate()
    whole = load_file(tiny.path)
    stored_as(tiny, torch.bfloat16)
    monkeypatch.setattr(experts, "AT_ONCE", 0)
    seen: list[tuple[torch.dtype, int]] = []
    for home in (layer, layer_passes):

        def passing(module: Any, *arguments: Any, run: Any = home.run_layer) -> Any:
            seen.extend((p.dtype, p.dim()) for p in module.parameters())
            return run(module, *arguments)

        monkeypatch.setattr(home, "run_layer", passing)
    single = tiny.using("single.rain.safetensors", fit=fit)
    single.calibrate()
    assert {dtype for dtype, axes in seen if axes == 3} == {torch.bfloat16}
    assert {dtype for dtype, axes in seen if axes == 2} == {torch.float32}
    found = load_file(single.path)
    assert found.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("count", "itemsize", "stored", "stays"),
    [(100 * 2**20, 4, 2, True), (50 * 2**20, 4, 2, False), (100 * 2**20, 2, 2, False)],
)
def test_only_large_and_narrower_tensors_stay(
    count: int, itemsize: int, stored: int, stays: bool
) -> None:
    assert experts.stays_stored(count, itemsize, stored) is stays
