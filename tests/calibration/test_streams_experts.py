"""Stream matching of mixtures of experts, against a dense float64 computation, and in use.

The reference knows transformers' own experts and the formulas of the page on stream matching: it
looks at one expert after the other and writes every matrix out.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from architectures import make
from click.testing import CliRunner
from merging import merge
from safetensors import safe_open
from test_streams_exact import EPSILON, WHOLE, Hooks, Reference, by_rule, write_many
from tiny import SITES, Tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from rain_mergekit.calibration.expert_fit import LEAST_TOKENS
from rain_mergekit.calibration.fit_rule import sums_bytes
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.cli import cli
from rain_mergekit.linalg.ridge_fit import CANDIDATES

# One tensor an expert with tables of names in mergekit; packed, transposed, with biases.
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")


class OwnExperts(Tiny):
    """Models that compute with transformers' own experts."""

    def model(self, role: str = "reasoning", **options: Any) -> Any:
        return super().model(role, experts_implementation="eager", **options)


@dataclass(frozen=True)
class Seen:
    """All texts: what the experts of a layer see (n, d), where each token goes, the residual."""

    inputs: Tensor
    chosen: Tensor
    gates: Tensor
    after: Tensor

    @classmethod
    def of(cls, model: Any, hooks: Hooks, texts: list[tuple[int, ...]], layer: str) -> Seen:
        rows: list[tuple[Tensor, ...]] = []
        for ids in texts:
            with torch.no_grad():
                model(input_ids=torch.tensor([list(ids)]))
            inputs = hooks.inputs[f"{layer}.mlp.experts"]
            routes = hooks.routes[f"{layer}.mlp.experts"]
            rows.append((inputs, *routes, hooks.outputs[f"{layer}.after mlp"]))
        return cls(*(torch.cat(parts) for parts in zip(*rows, strict=True)))

    def tokens(self, expert: int) -> tuple[Tensor, Tensor]:
        at, place = torch.where(self.chosen == expert)
        return at, self.gates[at, place]


class MixtureReference(Reference):
    """The fit of the attention is its parent's; experts follow."""

    def __init__(self, tiny: Tiny, *, choosing: bool = False) -> None:
        super().__init__(
            OwnExperts(tiny.folder, tiny.settings, tiny.calibration), choosing=choosing
        )
        self.teachers = self.reasoning, self.instruct
        self.hooks = [Hooks(model) for model in self.teachers]
        self.kept: list[str] = []

    @property
    def ids(self) -> list[tuple[int, ...]]:
        return [text.ids for text in self.texts]

    @cached_property
    def answers(self) -> Tensor:
        taught = [text.answers.clone() for text in self.texts]
        for mask, text, places in zip(taught, self.texts, self.better, strict=True):
            mask[places] = False
            mask[list(text.asked)] = True
        return torch.cat(taught)

    def fit(self) -> dict[str, Tensor]:
        changes: dict[str, Tensor] = {}
        for index in range(len(self.merged.model.layers)):
            for members in (SITES["self_attn.q_proj"], SITES["self_attn.o_proj"]):
                changes |= self.fit_site(index, members)
            changes |= self.fit_experts(f"model.layers.{index}")
        return changes

    def fit_experts(self, layer: str) -> dict[str, Tensor]:
        """D of every expert; keys as `model.layers.0.mlp.experts.gate_up_proj.3`."""
        name = f"{layer}.mlp.experts"
        experts = self.merged.get_submodule(name)
        seen = [
            Seen.of(model, hooks, self.ids, layer)
            for model, hooks in zip(self.teachers, self.hooks, strict=True)
        ]
        now = Seen.of(self.merged, self.own, self.ids, layer)
        answers, found = self.answers, {}
        target = torch.where(answers[:, None], seen[1].after, seen[0].after)

        def lacks_up(expert: int, at: Tensor) -> Tensor:
            given = [
                first(model.get_submodule(name), expert, one.inputs[at])
                for model, one in zip(self.teachers, seen, strict=True)
            ]
            wanted = torch.where(answers[at, None], given[1], given[0])
            return wanted - first(experts, expert, now.inputs[at])

        found |= self.solve(f"{name}.gate_up_proj", now, lambda _, at: now.inputs[at], lacks_up)
        self.add(found)
        lacking = target - Seen.of(self.merged, self.own, self.ids, layer).after

        def inner(expert: int, at: Tensor) -> Tensor:
            result: Tensor = experts._apply_gate(first(experts, expert, now.inputs[at]))
            return result

        def lacks_down(_: int, at: Tensor) -> Tensor:
            return lacking[at] / now.gates[at].sum(1, keepdim=True)

        down = self.solve(f"{name}.down_proj", now, inner, lacks_down)
        self.add(down)
        return found | down

    def solve(self, name: str, seen: Seen, inputs: Any, errors: Any) -> dict[str, Tensor]:
        count = self.merged.get_parameter(name).shape[0]
        aside, energies, systems = self.aside, [], {}
        for expert in range(count):
            at, gates = seen.tokens(expert)
            counts = self.weight[at] > 0
            at, gates = at[counts], gates[counts]
            weight = self.weight[at] * gates.square()
            with torch.no_grad():
                x, e = inputs(expert, at), errors(expert, at)
            fitted = ~aside[at]
            energies.append(float((weight[fitted] * x[fitted].square().sum(1)).sum()))
            systems[expert] = x, e, weight, fitted
        energy = sum(energies) / count / x.shape[1]
        found = {}
        for expert, (x, e, weight, fitted) in systems.items():
            if int(fitted.sum()) < LEAST_TOKENS:
                self.kept.append(f"{name}.{expert}")
                continue
            change = self.best(x, e, weight, fitted, energy)
            if change is None:
                self.kept.append(f"{name}.{expert}")
            else:
                found[f"{name}.{expert}"] = change
        return found

    def best(
        self, x: Tensor, e: Tensor, weight: Tensor, fitted: Tensor, energy: float
    ) -> Tensor | None:
        """The change by the rule for ε; None if the best leaves more errors held out than none."""
        inside, outside = torch.diag(weight * fitted), weight[~fitted, None]
        gram, cross = x.mT @ inside @ x, e.mT @ inside @ x
        eye = torch.eye(len(gram), dtype=torch.float64)
        choose = bool(len(outside)) and any(self.held)
        solutions = {
            epsilon: cross @ torch.linalg.inv(gram + epsilon * energy * eye)
            for epsilon in (CANDIDATES if choose else (EPSILON,))
        }
        if not choose:
            return solutions[EPSILON]

        def left(change: Tensor) -> float:
            return float((outside * (e - x @ change.mT)[~fitted].square()).sum())

        without = left(torch.zeros_like(solutions[EPSILON]))
        removed = {epsilon: without - left(change) for epsilon, change in solutions.items()}
        return solutions[by_rule(removed)] if max(removed.values()) > 0 else None

    def add(self, changes: dict[str, Tensor]) -> None:
        for key, change in changes.items():
            name, _, expert = key.rpartition(".")
            weight = self.merged.get_parameter(name).data[int(expert)]
            weight += change if weight.shape == change.shape and not transposed(self) else change.mT


def transposed(reference: Reference) -> bool:
    experts = reference.merged.model.layers[0].mlp.experts
    return bool(getattr(experts, "is_transposed", False))


def first(experts: Any, expert: int, rows: Tensor) -> Tensor:
    """What the first projection of one expert gives, with its bias."""
    weight = experts.gate_up_proj[expert].detach()
    out = rows @ weight if getattr(experts, "is_transposed", False) else rows @ weight.mT
    bias = getattr(experts, "gate_up_proj_bias", None)
    return out if bias is None else out + bias[expert].detach()


def merged_state(tmp_path: Path, tiny: Tiny) -> dict[str, Tensor]:
    """Through stock mergekit-yaml, read by transformers."""
    outcome = merge(tmp_path / "merge", tiny.content(rain=None))
    assert outcome.code == 0, outcome.output
    model = AutoModelForCausalLM.from_pretrained(outcome.folder, dtype=torch.float64)
    return dict(model.state_dict())


def check(tmp_path: Path, tiny: Tiny, reference: MixtureReference) -> None:
    """What mergekit writes is what the reference made, weight by weight."""
    tiny.calibrate(dtype=torch.float64)
    expected = reference.fit()
    experts = [key for key in expected if ".experts." in key]
    assert experts
    state = merged_state(tmp_path, tiny)
    base = reference.reasoning.state_dict()
    for name, weight in reference.merged.state_dict().items():
        change = weight - base[name]
        error = float((state[name] - weight).norm())
        # float32 is what the file and the models are stored in
        assert error <= 1e-5 * float(change.norm()) + 2e-7 * float(weight.norm()), name
        if ".experts." in name and "bias" not in name:
            assert float(change.norm()) > 0.001 * float(weight.norm()), name


@pytest.mark.parametrize(
    "family", ["mixtral", *(pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES[1:])]
)
def test_experts_are_fitted_as_the_dense_computation_says(tmp_path: Path, family: str) -> None:
    tiny = make(tmp_path, family).using(**WHOLE)
    check(tmp_path, tiny, MixtureReference(tiny))


def test_experts_keep_their_own_teacher_where_it_says_better_what_follows(tmp_path: Path) -> None:
    tiny = make(tmp_path, "qwen3_moe").using(**WHOLE, teacher_margin=0.1)
    reference = MixtureReference(tiny)
    assert any(reference.better)
    check(tmp_path, tiny, reference)


def test_experts_of_the_instruct_model_teach_the_instructions_too(tmp_path: Path) -> None:
    tiny = make(tmp_path, "qwen3_moe").using(**WHOLE, teach_instructions=True)
    reference = MixtureReference(tiny)
    assert any(text.asked for text in reference.texts)
    check(tmp_path, tiny, reference)


def test_penalties_are_chosen_by_texts_held_out_and_what_does_not_help_is_left(
    tmp_path: Path,
) -> None:
    settings = {name: value for name, value in WHOLE.items() if name != "stream_epsilon"}
    tiny = make(tmp_path, "qwen3_moe").using(**settings)
    write_many(tmp_path)
    reference = MixtureReference(tiny, choosing=True)
    check(tmp_path, tiny, reference)
    assert unchanged(tiny) == set(reference.kept)
    chosen = {fit["epsilon"] for fit in fits(tiny).values()}
    assert len(chosen) > 1


def unchanged(tiny: Tiny) -> set[str]:
    """The experts that the file names as those that stay; as `layer.mlp.experts.weight.3`."""
    found = set()
    for layer in CalibrationFile.open(tiny.path).header["streams"]["layers"]:
        for module, one in layer["experts"].items():
            name = f"{layer['name']}.{module}"
            found |= {f"{name}.{w}.{e}" for w in ("gate_up_proj", "down_proj") for e in one["few"]}
            found |= {f"{name}.{w}.{e}" for w, experts in one["worse"].items() for e in experts}
    return found


def fits(tiny: Tiny) -> dict[str, dict[str, float]]:
    tensors = CalibrationFile.open(tiny.path).header["tensors"]
    return {name: entry["fit"] for name, entry in tensors.items() if ".experts." in name}


def test_experts_that_few_tokens_reach_stay_and_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With so many experts each has fewer tokens than features, and some have hardly any."""
    options = {**architectures.FAMILIES, "mixtral": {"num_local_experts": 32}}
    monkeypatch.setattr(architectures, "FAMILIES", options)
    tiny = make(tmp_path, "mixtral").using(**WHOLE)
    reference = MixtureReference(tiny)
    check(tmp_path, tiny, reference)
    header = CalibrationFile.open(tiny.path).header
    tokens = [one for layer in header["streams"]["layers"] for one in counts(layer)]
    few = [one for one in tokens if one < LEAST_TOKENS]
    assert few
    assert any(LEAST_TOKENS <= one < 48 for one in tokens)  # fewer than an input has features
    assert unchanged(tiny) == set(reference.kept)
    assert len(reference.kept) == 2 * len(few)
    warning = f"fewer than {LEAST_TOKENS} fitted tokens were routed to {len(few)} of 64 experts"
    assert any(line.startswith(warning) for line in header["warnings"])
    shown = CliRunner().invoke(cli, ["inspect", str(tiny.path)])
    assert "with too few" in shown.output
    for name in reference.kept:
        weight, _, expert = name.rpartition(".")
        own, changed = (m.get_parameter(weight)[int(expert)] for m in both(reference))
        assert torch.equal(own, changed)


def counts(layer: dict[str, Any]) -> list[int]:
    return [count for one in layer["experts"].values() for count in one["tokens"]]


def both(reference: MixtureReference) -> tuple[Any, Any]:
    return reference.reasoning, reference.merged


def test_the_file_is_the_same_whatever_stays_in_memory(tmp_path: Path) -> None:
    """Rows of experts that find no room in the budget are read from the disk, token by token."""
    tiny = make(tmp_path, "qwen3_moe").using(fit="streams")
    tiny.calibrate()
    whole = tiny.path.read_bytes()
    tiny.path.unlink()
    tiny.calibrate(activation_budget=2 * sums_bytes(48))
    assert tiny.path.read_bytes() == whole


def test_with_the_same_model_as_teacher_no_expert_changes(tmp_path: Path) -> None:
    tiny = make(tmp_path, "qwen3_moe")
    shutil.rmtree(tmp_path / "instruct")
    shutil.copytree(tmp_path / "reasoning", tmp_path / "instruct")
    tiny = tiny.using(fit="streams", stream_start=0.0, accept=["no_thinking", "same_model"])
    tiny.calibrate()
    assert not unchanged(tiny)  # no change is worse, none is there
    file, weights = CalibrationFile.open(tiny.path), tiny.weights("reasoning")
    for name, plan in file.tensors.items():
        factors = file.change(plan)
        assert factors is not None
        change = factors[0].double() @ factors[1].double().mT
        assert float(change.norm()) < 1e-5 * float(weights[name].double().norm())


def test_experts_may_stay_as_they_are_and_then_there_is_an_adapter(tmp_path: Path) -> None:
    tiny = make(tmp_path, "qwen3_moe").using(fit="streams", stream_start=0.0)
    tiny.calibrate()
    refused = CliRunner().invoke(cli, ["export-lora", str(tiny.path), str(tmp_path / "no")])
    assert refused.exit_code == 1
    assert "stream_experts: false" in refused.output
    assert not (tmp_path / "no").exists()
    alone = tiny.using(fit="streams", stream_start=0.0, stream_experts=False)
    alone.calibrate()
    file = CalibrationFile.open(alone.path)
    assert not any(".experts." in name for name in file.tensors)
    assert any(".experts." in name for name in file.header["untouched"])
    done = CliRunner().invoke(cli, ["export-lora", str(alone.path), str(tmp_path / "adapter")])
    assert done.exit_code == 0, done.output


def test_the_layers_come_nearer_to_their_teachers_than_without_experts(tmp_path: Path) -> None:
    """On fitted texts and on those held out, which the packaged sets have enough of."""
    tiny = make(tmp_path, "mixtral")
    write_many(tmp_path)
    errors = []
    for experts in (False, True):
        one = tiny.using(fit="streams", stream_experts=experts)
        one.calibrate()
        errors.append(CalibrationFile.open(one.path).header["streams"]["layers"][-1])
    for kind in ("fitted", "held_out"):
        for group in ("answers", "thinking"):
            assert errors[1][kind][group] < 0.9 * errors[0][kind][group]


def test_a_file_with_packed_experts_asks_for_a_reader_that_knows_them(tmp_path: Path) -> None:
    tiny = make(tmp_path, "gpt_oss").using(fit="streams", stream_start=0.0, max_rank=3)
    tiny.calibrate()
    with safe_open(tiny.path, framework="pt") as file:
        assert file.metadata()["format_version"] == "5"
    plan = CalibrationFile.open(tiny.path).tensors["model.layers.0.mlp.experts.down_proj"]
    assert len(plan.ranks) == plan.shape[0]
    assert max(plan.ranks) == 3
