"""`mergekit-rain diff` against norms of whole models, and the relations of a merge's parents."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TRIO, refused, run, succeed
from safetensors.torch import load_file, save_file
from torch import Tensor

from rain_mergekit.evaluation.model_diff import compare_tensors
from rain_mergekit.evaluation.parents import relation, task_vector_pair

REASONING, INSTRUCT = TRIO / "reasoning", TRIO / "instruct"


def weights(folder: Path) -> dict[str, Tensor]:
    return {n: t.double() for n, t in load_file(folder / "model.safetensors").items()}


def diff(first: Path, second: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("diff", first, second, "--json").stdout)
    return found


def change(folder: Path, how: Any) -> Path:
    shutil.copytree(REASONING, folder)
    tensors = load_file(folder / "model.safetensors")
    how(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_every_tensor_by_its_norm() -> None:
    found = diff(REASONING, INSTRUCT)
    one, other = weights(REASONING), weights(INSTRUCT)
    assert [item["name"] for item in found["tensors"]] == sorted(one)
    for item in found["tensors"]:
        a, b = one[item["name"]].flatten(), other[item["name"]].flatten()
        assert item["relative"] == pytest.approx(float((b - a).norm() / a.norm()))
        assert item["cosine"] == pytest.approx(float(a @ b / a.norm() / b.norm()))
        assert item["changed"] == pytest.approx(float((a != b).double().mean()))
    apart = math.hypot(*(float((other[n] - one[n]).norm()) for n in one))
    assert found["relative"] == pytest.approx(
        apart / math.hypot(*(float(tensor.norm()) for tensor in one.values()))
    )
    assert (found["format"], found["version"]) == ("mergekit-rain diff", 1)


def test_what_did_not_change_is_equal() -> None:
    said = succeed("diff", REASONING, REASONING)
    assert "50 tensors compared: 50 equal, 0 changed; all together by 0 %" in said


def test_one_layer_that_changed_is_seen(tmp_path: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    merged = change(tmp_path / "merged", lambda tensors: tensors[name].mul_(2))
    found = diff(REASONING, merged)
    assert [item["name"] for item in found["tensors"] if item["changed"]] == [name]
    (item,) = (item for item in found["tensors"] if item["name"] == name)
    assert (item["kind"], item["layer"], item["relative"]) == ("mlp.up_proj", 2, pytest.approx(1))
    said = succeed("diff", REASONING, merged)
    row = next(line for line in said.splitlines() if line.startswith("mlp.up_proj"))
    assert row.split() == ["mlp.up_proj", "1/4", "25", "100", "1.000", "0090"]


def test_tensors_that_one_lacks_and_other_shapes(tmp_path: Path) -> None:
    def how(tensors: dict[str, Tensor]) -> None:
        tensors["extra"] = torch.ones(2)
        del tensors["model.norm.weight"]
        table = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = torch.cat([table, table[:3]])
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(2, 2)

    found = diff(REASONING, change(tmp_path / "merged", how))
    assert found["only_first"] == ["model.norm.weight"]
    assert found["only_second"] == ["extra"]
    assert len(found["reshaped"]) == 2
    rows = {item["name"]: item for item in found["tensors"]}
    assert rows["model.embed_tokens.weight"]["changed"] == 0
    assert "model.layers.0.mlp.up_proj.weight" not in rows


def test_page_of_a_diff(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / "diff.html"
    succeed("diff", REASONING, INSTRUCT, "--html", page)
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 2
    assert "self_attn.v_proj.bias" in text


def test_models_without_a_common_tensor(tmp_path: Path) -> None:
    other = change(tmp_path / "other", lambda tensors: tensors.clear())
    save_file({"a": torch.ones(1)}, other / "model.safetensors", metadata={"format": "pt"})
    assert "no tensor name in common" in refused(tmp_path, "diff", REASONING, other)


def test_numbers_of_no_dimension_and_zeros() -> None:
    found = compare_tensors("scale", torch.tensor(2.0), torch.tensor(3.0))
    assert (found.norm, found.change, found.changed, found.layer) == (2, 1, 1, None)
    zero = compare_tensors("a", torch.zeros(3), torch.ones(3))
    assert zero.relative == math.inf
    assert math.isnan(zero.cosine)


# The parents


def test_relation_by_hand() -> None:
    one = {"a": torch.tensor([[3.0, 0.0]]), "b": torch.tensor([[4.0]])}
    other = {"a": torch.tensor([[3.0, 5.0]]), "b": torch.tensor([[4.0]])}
    found = relation(one, other)
    assert found.distance == pytest.approx(1)
    assert found.cosine == pytest.approx(1 / math.sqrt(2))


def test_task_vectors_by_hand() -> None:
    origin = {"a": torch.tensor([[1.0, 2.0, 2.0, 0.0]])}
    tuned = {"a": torch.tensor([[2.0, 2.0, 3.0, 1.0]])}
    thinking = {"a": torch.tensor([[0.0, 5.0, 4.0, 1.0]])}
    found = task_vector_pair(tuned, thinking, origin)
    assert found.instruct == pytest.approx(math.sqrt(3) / 3)
    assert found.reasoning == pytest.approx(math.sqrt(15) / 3)
    assert found.cosine == pytest.approx(2 / math.sqrt(45))
    assert found.agreement == pytest.approx(2 / 3)
