"""regmean and aim where a checkpoint holds experts in one tensor, in parts, or its head tied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import Reference, Watched, auto_class, make, run_whole, store_as_modules, watched
from merging import merge
from tiny import Tiny, shard
from torch import Tensor

from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import calibrate

STRENGTH, EPSILON, OMEGA = 0.5, 1e-6, 0.3
Seen = dict[str, list[dict[tuple[str, "int | None"], Watched]]]


@pytest.fixture(
    scope="module",
    params=[
        "deepseek_v3",  # experts in one tensor of three dimensions
        pytest.param("qwen3_moe", marks=pytest.mark.slow),  # each expert in a tensor of its own
        pytest.param("gemma2", marks=pytest.mark.slow),  # a head that is the embedding
    ],
)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Every checkpoint in several files."""
    made = make(tmp_path_factory.mktemp(request.param), request.param)
    for role in ("pretrained", "instruct", "reasoning"):
        if request.param == "deepseek_v3":
            store_as_modules(made.folder / role)
        shard(made.folder / role)
    return made


def merged(tiny: Tiny, content: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """Calibrate, merge with mergekit's command, and load what it wrote with transformers."""
    changes = {key: content[key] for key in ("merge_method", "base_model", "models")}
    calibrate(tiny.config(**changes), RunOptions(quiet=True))
    outcome = merge(folder, {key: value for key, value in content.items() if key != "rain"})
    assert outcome.code == 0, outcome.output
    reference = Reference(tiny.using())
    loader = auto_class(reference.reasoning_model.config)
    state: dict[str, Tensor] = loader.from_pretrained(
        outcome.folder, dtype=torch.float64
    ).state_dict()
    return state


def second_moment(seen: Seen, key: tuple[str, int | None], kind: str) -> Tensor | None:
    rows = [one[key].inputs for one in seen[kind] if key in one and len(one[key].inputs)]
    if not rows:
        return None
    x = torch.cat(rows)
    return x.mT @ x / len(x)


def kept(seen: Seen, key: tuple[str, int | None]) -> Tensor:
    """G_I (G_I + s G_R)^-1 with a ridge; of an expert that no reasoning token reached, 1."""
    reasoning, metric = (second_moment(seen, key, kind) for kind in ("reasoning", "instruction"))
    if reasoning is None:
        return torch.ones(()).double()
    metric = torch.zeros_like(reasoning) if metric is None else metric
    energy = float(metric.trace()) or float(reasoning.trace())
    metric = metric + EPSILON * energy / len(metric) * torch.eye(len(metric), dtype=metric.dtype)
    return metric @ torch.linalg.inv(metric + STRENGTH * reasoning)


def test_regmean_is_the_dense_solution_for_every_matrix(tiny: Tiny, tmp_path: Path) -> None:
    regmean = {"rows": 10**6, "thinking_weight": STRENGTH, "epsilon": EPSILON}
    settings = {"rank_by": "full", "max_rank": 4096, "regmean": regmean}
    own = tiny.using("tiny.regmean.safetensors", **settings)
    found = merged(own, own.content(merge_method="regmean"), tmp_path)
    reference = Reference(tiny)
    base = reference.reasoning_model.state_dict()
    assert reference.every
    for key in reference.every:
        name, expert = key
        old, new, delta = (
            one[name] if expert is None else one[name][expert]
            for one in (base, found, reference.deltas)
        )
        axes = (lambda t: t.mT) if reference.transposed(name) else (lambda t: t)
        keep = kept(reference.seen, key)
        change = axes(delta) * keep if keep.dim() == 0 else axes(delta) @ keep
        assert (axes(new - old) - change).norm() < 1e-3 * change.norm(), key
    others = set(base) - {name for name, _ in reference.every}
    assert all(torch.equal(found[name], base[name]) for name in others)


def test_aim_takes_back_the_busy_channels_of_every_matrix(tiny: Tiny, tmp_path: Path) -> None:
    own = tiny.using("tiny.aim.safetensors")
    models = [
        {"model": str(tiny.folder / role), "parameters": {"role": role}}
        for role in ("reasoning", "instruct")
    ]
    content = own.content(
        merge_method="aim",
        base_model=str(tiny.folder / "pretrained"),
        models=models,
        parameters={"calibration": str(own.path), "omega": OMEGA, "lambda": 0.6},
    )
    found = merged(own, content, tmp_path)
    reference = Reference(tiny)
    states = {role: reference.model(role).state_dict() for role in ("reasoning", "instruct")}
    pretrained = reference.model("pretrained")
    base = pretrained.state_dict()
    busy = channels(reference, pretrained)
    assert busy
    for name, origin in base.items():
        change = 0.6 * sum(state[name] - origin for state in states.values())
        if name in busy:
            factor = 1 - (1 - OMEGA) * busy[name] / busy[name].max()
            change = change * (factor[:, None] if reference.transposed(name) else factor)
        assert (found[name] - origin - change).norm() <= 1e-4 * change.norm() + 1e-6, name


def channels(reference: Reference, model: Any) -> dict[str, Tensor]:
    """The sum of |x| by input channel over all tokens, of experts over all of them together."""
    sums: dict[str, Tensor] = {}
    for samples in reference.samples.values():
        for sample in samples:
            with watched(model) as seen:
                run_whole(model, sample.input_ids)
            for (name, _), one in seen.items():
                if name.startswith(reference.prefix):
                    total = one.inputs.abs().sum(0)
                    sums[name] = sums.get(name, torch.zeros_like(total)) + total
    return sums
