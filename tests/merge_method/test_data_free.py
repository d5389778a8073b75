"""opcm, pcb and wudi: published and independently computed values, then real merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit import merge_methods
from mergekit.merge_methods.base import TensorGroup
from merging import Outcome, Trio, merge
from safetensors.torch import save_file
from tiny import read_weights, shard
from torch import Tensor

METHODS = ("opcm", "pcb", "wudi")
ROWS = (
    [0.1, -0.2, 0.3, 0.4, -0.5, 0.6, 0.0, -0.8, 0.9, 1.0],
    [0.2, 0.2, -0.1, 0.4, -0.4, -0.9, 0.7, -0.1, 0.05, 1.0],
)
NINE = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]
LINEAR = "model.layers.0.mlp.up_proj.weight"


def apply(method: str, deltas: list[Tensor], name: str = LINEAR, **parameters: Any) -> Tensor:
    """One tensor through mergekit's own interface, W_B = 0."""
    tensors = [torch.zeros_like(deltas[0]), *deltas]
    group = TensorGroup.from_tensors(tensors, base_index=0, name=name)
    (result,) = merge_methods.get(method)([group], parameters=parameters)
    return result


@pytest.mark.parametrize(
    ("first", "second", "alpha", "wanted"),
    [
        (
            torch.diag(torch.tensor([3.0, 2.0, 1.0])),
            torch.tensor(NINE),
            alpha,
            [
                [2.232570, 1.488380, 2.232570],
                [2.976760, 1.488380, 4.465140],
                [5.209331, 5.953521, 0.744190],
            ],
        )
        for alpha in (0.4, 0.6)
    ]
    + [
        (
            torch.diag(torch.tensor([3.0, 2.0, 1.0])),
            torch.tensor(NINE),
            0.9,
            [
                [2.358802, 0, 2.358802],
                [0, 1.572535, 4.717604],
                [5.503872, 6.290139, 0.786267],
            ],
        ),
        (
            torch.diag(torch.tensor([3.0, 1.0])),
            torch.tensor([[1.0, 2.0], [4.0, 1.0]]),
            0.5,
            [[2.150549, 1.433699], [2.867398, 0.716850]],
        ),
        (
            torch.tensor([[2.0, 1.0], [1.0, 2.0]]),
            torch.tensor([[1.0, 2.0], [4.0, 1.0]]),
            0.5,
            [[2.266877, 0], [2.266877, 2.266877]],
        ),
    ],
)
def test_opcm_gives_the_published_numbers(
    first: Tensor, second: Tensor, alpha: float, wanted: list[list[float]]
) -> None:
    found = apply("opcm", [first, second], alpha=alpha)
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=2e-6)


def test_opcm_without_scaling_is_the_sum_with_the_second_projected() -> None:
    first, second = torch.diag(torch.tensor([3.0, 1.0])), torch.tensor([[1.0, 2.0], [4.0, 1.0]])
    found = apply("opcm", [first, second], normalize="none", **{"lambda": 2.0})
    wanted = 2 * torch.tensor([[3.0, 2.0], [4.0, 1.0]])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def recursion(deltas: list[Tensor], alpha: float) -> Tensor:
    """The paper's recursion with its factor at every step, full SVDs, one tensor as the model."""
    merged, factor = deltas[0].clone(), 1.0
    norms = [deltas[0].norm()]
    for delta in deltas[1:]:
        u, s, vt = torch.linalg.svd(merged, full_matrices=True)
        p = u.mT @ delta @ vt.mT
        shares = s.cumsum(0) / s.sum()
        r = int((shares > alpha).nonzero()[0]) if alpha < 1 else len(s)
        p.diagonal().zero_()
        p[:r, :r] = 0
        norms.append(delta.norm())
        total = factor * merged + u @ p @ vt
        factor = float(total.norm() / torch.stack(norms).mean())
        merged = total / factor
    return merged


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_opcm_of_four_models_is_the_recursion(shape: tuple[int, int], alpha: float) -> None:
    torch.manual_seed(3)
    deltas = [torch.randn(shape, dtype=torch.float64) for _ in range(4)]
    found = apply("opcm", deltas, alpha=alpha)
    torch.testing.assert_close(found, recursion(deltas, alpha), rtol=1e-10, atol=1e-12)


def test_opcm_leaves_directions_alone_in_which_nothing_is_kept() -> None:
    first = torch.zeros(4, 3)
    second = torch.randn(4, 3)
    found = apply("opcm", [first, second], normalize="none")
    assert torch.equal(found, second)


@pytest.mark.parametrize(
    ("density", "wanted"),
    [
        (0.3, [0, 0, 0, 0, 0, -0.9, 0.7, -0.8, 0.9, 1.0]),
        (0.5, [0, 0, 0, 0.4, -0.452487, -0.587009, 0.7, -0.8, 0.9, 1.0]),
    ],
)
def test_pcb_gives_the_papers_numbers(density: float, wanted: list[float]) -> None:
    found = apply("pcb", [torch.tensor(row) for row in ROWS], density=density, **{"lambda": 1})
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=1e-6)


@pytest.mark.parametrize("density", [0.1, 0.01, 1.0])
def test_pcb_is_finite_where_one_element_or_constants_survive(density: float) -> None:
    deltas = [torch.tensor(row) for row in ROWS]
    assert apply("pcb", deltas, density=density).isfinite().all()
    constant = [torch.full((4,), 0.5), torch.full((4,), 0.25)]
    found = apply("pcb", constant, density=density, **{"lambda": 1})
    torch.testing.assert_close(found, torch.full((4,), 0.375))
    assert not apply("pcb", [torch.zeros(4), torch.zeros(4)], density=density).any()


def test_pcb_does_not_depend_on_the_size_of_the_deltas() -> None:
    torch.manual_seed(5)
    deltas = [torch.randn(40, 30), torch.randn(40, 30)]
    small = apply("pcb", [1e-6 * delta for delta in deltas])
    torch.testing.assert_close(small * 1e6, apply("pcb", deltas), rtol=1e-4, atol=1e-5)


def test_wudi_adds_what_does_not_interfere_and_averages_what_is_alike() -> None:
    one, two = torch.diag(torch.tensor([1.0, 0.0])), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    found = apply("wudi", [one, two], **{"lambda": 1})
    torch.testing.assert_close(found, torch.diag(torch.tensor([1.0, 2.0])))
    same = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    torch.testing.assert_close(apply("wudi", [same, same], **{"lambda": 1}), same)


@pytest.mark.parametrize("shape", [(9, 6), (4, 12), (6, 6)])
def test_wudi_is_the_dense_closed_form(shape: tuple[int, int]) -> None:
    torch.manual_seed(7)
    deltas = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    grams = [delta.mT @ delta / delta.norm() ** 2 for delta in deltas]
    numerator = sum(delta @ gram for delta, gram in zip(deltas, grams, strict=True))
    wanted = numerator @ torch.linalg.pinv(grams[0] + grams[1], rtol=1e-6)
    found = apply("wudi", deltas, **{"lambda": 1})
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


def test_wudi_minimises_the_published_loss() -> None:
    torch.manual_seed(8)
    deltas = [torch.randn(5, 4, dtype=torch.float64) for _ in range(2)]

    def loss(tau: Tensor) -> float:
        return sum(float(((tau - d) @ d.mT).norm() ** 2 / d.norm() ** 2) for d in deltas)

    best = apply("wudi", deltas, **{"lambda": 1})
    assert all(loss(best) < loss(best + 1e-3 * torch.randn_like(best)) for _ in range(20))


@pytest.mark.parametrize("method", ["opcm", "wudi"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_what_is_no_linear_map_is_task_arithmetic(method: str, name: str) -> None:
    torch.manual_seed(2)
    shape = (8,) if "norm" in name else (8, 4)
    deltas = [torch.randn(shape), torch.randn(shape)]
    options = {"normalize": "none"} if method == "opcm" else {}
    found = apply(method, deltas, name, **options, **{"lambda": 0.5})
    torch.testing.assert_close(found, 0.5 * (deltas[0] + deltas[1]))


@pytest.mark.parametrize("method", ["opcm", "wudi"])
def test_experts_are_merged_one_by_one(method: str) -> None:
    torch.manual_seed(4)
    deltas = [torch.randn(3, 6, 4), torch.randn(3, 6, 4)]
    options = {"normalize": "none"} if method == "opcm" else {}
    found = apply(method, deltas, "model.layers.0.mlp.experts.gate_up_proj", **options)
    for expert in range(3):
        alone = apply(method, [delta[expert] for delta in deltas], **options)
        torch.testing.assert_close(found[expert], alone)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_is_computed_in_float32(method: str) -> None:
    torch.manual_seed(6)
    base = torch.randn(16, 12).bfloat16()
    others = [(base.float() + 1e-2 * torch.randn(16, 12)).bfloat16() for _ in range(2)]
    tensors = [base, *others]

    def run(tensors: list[Tensor]) -> Tensor:
        group = TensorGroup.from_tensors(tensors, base_index=0, name=LINEAR)
        return merge_methods.get(method)([group])[0]

    wide = run([tensor.float() for tensor in tensors])
    assert torch.equal(run(tensors), wide.bfloat16())


# Real merges.


def content(trio: Trio, method: str, **parameters: Any) -> dict[str, Any]:
    models = [{"model": str(trio.reasoning)}, {"model": str(trio.instruct)}]
    return {
        "merge_method": method,
        "base_model": str(trio.pretrained),
        "models": models,
        "parameters": parameters,
    }


def expected(trio: Trio, method: str, name: str) -> Tensor:
    """From the same weights through the interface that the values above went through."""
    base, *others = (trio.weights(r)[name] for r in ("pretrained", "reasoning", "instruct"))
    group = TensorGroup.from_tensors([base, *others], base_index=0, name=name)
    return merge_methods.get(method)([group])[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_a_real_merge_changes_every_weight(method: str, kind: str, tmp_path: Path) -> None:
    trio = Trio.make(tmp_path / "models", kind)  # qwen2: tied embeddings
    found = merge(tmp_path / "run", content(trio, method)).weights()
    for name, tensor in trio.weights("pretrained").items():
        torch.testing.assert_close(found[name], expected(trio, method, name))
        assert torch.equal(found[name], tensor) == torch.equal(
            trio.weights("instruct")[name], tensor
        )


def test_order_matters_to_opcm(tmp_path: Path) -> None:
    trio = Trio.make(tmp_path / "models")
    swapped = content(trio, "opcm")
    swapped["models"].reverse()
    runs = [
        merge(tmp_path / f"run{i}", one).weights()
        for i, one in enumerate((content(trio, "opcm"), swapped))
    ]
    assert not torch.allclose(runs[0][LINEAR], runs[1][LINEAR])


@pytest.mark.parametrize("method", METHODS)
def test_a_sharded_checkpoint_gives_the_same_merge(method: str, tmp_path: Path) -> None:
    trio = Trio.make(tmp_path / "models")
    whole = merge(tmp_path / "whole", content(trio, method)).weights()
    shard(trio.instruct)
    done = merge(tmp_path / "parts", content(trio, method), "--out-shard-size", "10K")
    assert done.code == 0, done.output
    assert len(list(done.folder.glob("model-*.safetensors"))) > 1
    found = read_weights(done.folder)
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def error(tmp_path: Path, trio: Trio, method: str, **changes: Any) -> str:
    parameters = changes.pop("parameters", {})
    run = content(trio, method, **parameters) | changes
    outcome: Outcome = merge(tmp_path / "run", {k: v for k, v in run.items() if v is not None})
    return outcome.error()


@pytest.mark.parametrize(
    ("method", "parameters", "said"),
    [
        ("opcm", {"alpha": 1.5}, "alpha must be a finite number from 0 to 1, found 1.5"),
        ("opcm", {"normalize": "global"}, "normalize must be tensor or none, found 'global'"),
        ("opcm", {"lambda": "much"}, "lambda must be a finite number, found 'much'"),
        ("opcm", {"density": 0.5}, "unknown parameter 'density'"),
        ("pcb", {"density": 0}, "density must be a finite number above 0 to 1, found 0"),
        ("pcb", {"ratio": 0.1}, "unknown parameter 'ratio'"),
        ("wudi", {"calibration": "x"}, "unknown parameter 'calibration'"),
        ("wudi", {"weight": "all"}, "weight must be a finite number, found 'all'"),
    ],
)
def test_bad_parameters_are_one_line(
    method: str, parameters: dict[str, Any], said: str, tmp_path: Path
) -> None:
    trio = Trio.make(tmp_path / "models")
    assert said in error(tmp_path, trio, method, parameters=parameters)


def test_missing_models_are_one_line(tmp_path: Path) -> None:
    trio = Trio.make(tmp_path / "models")
    said = error(tmp_path, trio, "pcb", base_model=None)
    assert "merge_method: pcb needs `base_model`, the pretrained model" in said
    said = error(tmp_path, trio, "pcb", models=[{"model": str(trio.pretrained)}])
    assert "merge_method: pcb needs a model besides base_model" in said


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    trio = Trio.make(tmp_path / "models")
    weights = trio.weights("instruct")
    weights[LINEAR][0, 0] = float("nan")
    save_file(weights, trio.instruct / "model.safetensors", {"format": "pt"})
    said = error(tmp_path, trio, "opcm")
    assert f"{LINEAR} holds NaN or infinite values in {trio.instruct}" in said
