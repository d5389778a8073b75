"""Quantised models in calibrations and merges, tensor by tensor: as with plain copies of them."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path

import pytest
import torch
from commands import ROLES, Workplace, refused, run, succeed
from merging import merge as stock_merge
from quantised import FP8_SECTION, fp8_blocks, mxfp4, quantise
from safetensors.torch import load_file, save_file
from test_dequantize import FORMATS, INT4, ROWS
from tiny import Tiny
from torch import Tensor

from rain_mergekit.dequantize.plain_view import PlainView, plain_view
from rain_mergekit.models.loading import LoadOptions, open_checkpoint


def with_copies(place: Workplace, roles: tuple[str, ...]) -> Path:
    """The same configuration with plain copies of these models, and a calibration of its own."""
    text = place.yaml.read_text().replace(str(place.calibration), f"{place.calibration}-2")
    for role in roles:
        folder = place.model(role)
        succeed("dequantize", folder, f"{folder}-bf16")
        text = re.sub(rf"(?m){re.escape(str(folder))}$", r"\g<0>-bf16", text)
    path = place.folder / "copies.yml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("roles", [ROLES, ("instruct",), ("reasoning",)])
@pytest.mark.parametrize("fit", ["streams", "projection"])
def test_a_merge_is_that_of_plain_copies(
    place: Workplace, roles: tuple[str, ...], fit: str
) -> None:
    """Every bit of it, and its config."""
    place.write(rain={"fit": fit})
    for role in roles:
        quantise(place.model(role), *FORMATS[role])
    copies = with_copies(place, roles)
    succeed("merge", copies, place.folder / "expected")
    succeed("merge", place.yaml, place.folder / "merged")
    expected, found = (
        load_file(place.folder / name / "model.safetensors") for name in ("expected", "merged")
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    merged = place.folder / "merged"
    assert (merged / "config.json").read_text() == (
        place.folder / "expected" / "config.json"
    ).read_text()
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    for name in ("mergekit_config.yml", "README.md"):
        text = (merged / name).read_text()
        assert "rain-plain-" not in text  # the folders that mergekit was shown
    assert str(place.model("instruct")) in (merged / "mergekit_config.yml").read_text()
    assert not list(merged.glob(".rain*"))


def test_stock_mergekit_names_both_ways(place: Workplace) -> None:
    quantise(place.model("instruct"), ROWS, FORMATS["pretrained"][1])
    succeed("calibrate", place.yaml)
    content = {key: value for key, value in place.config.items() if key != "rain"}
    message = stock_merge(place.folder / "stock", content).error()
    folder = place.model("instruct")
    assert "merge with `mergekit-rain merge`" in message
    assert f"run `mergekit-rain dequantize {folder} {folder}-bf16`" in message


def test_what_is_not_read_is_refused_by_name_before_any_work(place: Workplace) -> None:
    quantise(place.model("instruct"), {"quant_method": "gptq"}, fp8_blocks)
    for words in (("calibrate", place.yaml), ("merge", place.yaml, place.folder / "merged")):
        assert "instruct: " in (said := refused(place.folder, *words))
        assert "is published in GPTQ, which is not read here" in said


def test_the_tensors_are_those_of_the_plain_copy(tmp_path: Path) -> None:
    """Of experts too, whose tensor is made of one expert after the other."""
    folder, experts = tmp_path / "model", "model.layers.0.mlp.experts.gate_up_proj"
    folder.mkdir()
    weights = {experts: torch.randn(3, 32, 64), "model.norm.weight": torch.randn(32)}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    quantise(folder, {"quant_method": "mxfp4"}, mxfp4, ending="gate_up_proj")
    succeed("dequantize", folder, tmp_path / "plain")
    copy = load_file(tmp_path / "plain" / "model.safetensors")
    view = plain_view(open_checkpoint(str(folder), LoadOptions()))
    assert view.names == copy.keys() == weights.keys()
    assert view.shapes(copy) == {name: tuple(tensor.shape) for name, tensor in copy.items()}
    assert view.types(copy) == {experts: "BF16", "model.norm.weight": "F32"}
    assert view.bytes == sum(tensor.nbytes for tensor in copy.values())
    for one in (view, view.twin()):
        assert all(torch.equal(one.get(name), tensor) for name, tensor in copy.items())
    assert view.get(experts) is view.get(experts)  # for readers of one expert after the other
    view.release()
    with pytest.MonkeyPatch.context() as patch:  # of one expert no other is dequantised
        patch.setattr(PlainView, "get", None)
        assert all(torch.equal(view.part(experts, i), copy[experts][i]) for i in range(3))
    assert view.sizes([experts]) == {experts: copy[experts].nbytes}
    view.release()
    plain = open_checkpoint(str(tmp_path / "plain"), LoadOptions())
    assert plain_view(plain) is plain


def test_never_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six layers no more than three are plain at any time: in use, read ahead, in the making."""
    tiny = Tiny.make(tmp_path, "llama", torch.bfloat16, num_hidden_layers=6)
    for role in ("reasoning", "instruct"):
        quantise(tiny.folder / role, FP8_SECTION, fp8_blocks)
    alive: dict[int, int] = {}
    most, get = [0], PlainView.get

    def counted(self: PlainView, name: str) -> Tensor:
        found = get(self, name)
        if "layers" in name and self.made_of[name].formula is not None:
            alive[id(found)] = found.nbytes
            weakref.finalize(found, alive.pop, id(found), None)
            most[0] = max(most[0], sum(alive.values()))
        return found

    monkeypatch.setattr(PlainView, "get", counted)
    tiny.using(fit="streams").calibrate()
    layer = sum(
        tensor.nbytes
        for name, tensor in tiny.weights("pretrained").items()
        if ".layers.0." in name and tensor.dim() == 2
    )
    assert 0 < most[0] <= 3 * 2 * layer


def test_check_and_plan_read_them_too(place: Workplace) -> None:
    quantise(place.model("instruct"), INT4, FORMATS["instruct"][1])
    outcome = run("check", place.yaml)
    assert "is published in" not in outcome.output
    assert "calibration file: at most" in succeed("calibrate", place.yaml, "--plan")
