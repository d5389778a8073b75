"""Stream matching of whole models against a dense float64 computation that streams nothing.

The reference runs transformers' whole models once for every site of every layer, takes inputs and
outputs by hooks on nn.Linear, and solves the normal equations as they stand.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, SITES, Tiny
from torch import Tensor, nn

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.text.calibration_sets import load_instruction, load_reasoning

WEIGHTS = {"prompts": 0.5, "markers": 1.0, "thinking": 1.0, "answers": 1.0, "responses": 0.5}
EPSILON = 0.01
WHOLE = {"fit": "streams", "stream_rank_share": 1.0, "max_rank": 1000, "stream_epsilon": EPSILON}


@dataclass(frozen=True)
class Text:
    """Token ids, and the group of each token."""

    ids: tuple[int, ...]
    groups: tuple[str, ...]

    @property
    def answers(self) -> Tensor:
        return torch.tensor([group == "answers" for group in self.groups])


def read_texts(tiny: Tiny) -> list[Text]:
    """Both sets by the definition: text after text, token after token."""
    tokenizer, settings = tiny.tokenizer(), tiny.config().settings
    texts = []
    for sample in load_reasoning(settings.reasoning_data, tokenizer, keep_response=True).samples:
        groups = ["prompts"] * len(sample.input_ids)
        for name, positions in (
            ("responses", sample.response_positions),
            ("thinking", sample.content_positions),
            ("markers", sample.think_positions),
        ):
            for position in positions:
                groups[position] = name
        texts.append(Text(sample.input_ids, tuple(groups)))
    for other in load_instruction(str(settings.instruction_data), tokenizer).samples:
        groups = ["prompts"] * len(other.input_ids)
        for position in other.thinking_positions:
            groups[position] = "thinking"
        for position in other.think_positions:
            groups[position] = "markers"
        end = max(other.think_positions) + 1
        written = [
            i for i in other.response_positions if tokenizer.decode([other.input_ids[i]]).strip()
        ]
        first = min(written) - 1  # the token that predicts the answer's first one
        for position in range(end, len(groups)):
            groups[position] = "markers"
        for position in range(first, len(groups)):
            groups[position] = "answers"
        texts.append(Text(other.input_ids, tuple(groups)))
    return texts


class Hooks:
    """Inputs and outputs of every nn.Linear, and the residual stream after attention and MLP."""

    def __init__(self, model: Any) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self._linear(name))
        for index, layer in enumerate(model.model.layers):
            prefix = f"model.layers.{index}."
            layer.post_attention_layernorm.register_forward_pre_hook(
                lambda _, args, p=prefix: self.outputs.update({f"{p}after attention": args[0][0]})
            )
            layer.register_forward_hook(
                lambda _, __, out, p=prefix: self.outputs.update(
                    {f"{p}after mlp": (out[0] if isinstance(out, tuple) else out)[0]}
                )
            )

    def _linear(self, name: str) -> Any:
        def keep(_: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[name], self.outputs[name] = args[0][0], output[0]

        return keep


class Reference:
    """All texts through three whole models in float64."""

    def __init__(self, tiny: Tiny, strength: float = 1.0) -> None:
        self.texts, self.strength = read_texts(tiny), strength
        self.models = {r: tiny.model(r) for r in ("reasoning", "instruct")}
        self.merged = tiny.model("reasoning")
        self.hooks = {r: Hooks(model) for r, model in self.models.items()}
        self.own = Hooks(self.merged)

    def run(self, model: Any, hooks: Hooks) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        found = []
        for text in self.texts:
            with torch.no_grad():
                model(input_ids=torch.tensor([text.ids]))
            found.append((dict(hooks.inputs), dict(hooks.outputs)))
        return found

    @cached_property
    def weight(self) -> Tensor:
        groups = [group for text in self.texts for group in text.groups]
        return torch.tensor([WEIGHTS[g] / groups.count(g) for g in groups], dtype=torch.float64)

    def targets(self, key: str) -> Tensor:
        rows = []
        for text, own, other in zip(
            self.texts, self.taught["reasoning"], self.taught["instruct"], strict=True
        ):
            target = own[1][key].clone()
            mask = text.answers
            mixed = (1 - self.strength) * own[1][key] + self.strength * other[1][key]
            target[mask] = mixed[mask]
            rows.append(target)
        return torch.cat(rows)

    @cached_property
    def taught(self) -> dict[str, Any]:
        return {role: self.run(self.models[role], self.hooks[role]) for role in self.models}

    def fit(self) -> dict[str, Tensor]:
        """The change of each weight, in the order in which the modules run."""
        changes: dict[str, Tensor] = {}
        for index in range(len(self.merged.model.layers)):
            for members in SITES.values():
                now = self.run(self.merged, self.own)
                for member in members:
                    name = f"model.layers.{index}.{member}"
                    key = {
                        "self_attn.o_proj": f"model.layers.{index}.after attention",
                        "mlp.down_proj": f"model.layers.{index}.after mlp",
                    }.get(member, name)
                    x = torch.cat([inputs[name] for inputs, _ in now])
                    error = self.targets(key) - torch.cat([outputs[key] for _, outputs in now])
                    changes[name] = self._ridge(x, error)
                for member in members:
                    name = f"model.layers.{index}.{member}"
                    with torch.no_grad():
                        self.merged.get_submodule(name).weight += changes[name]
        return changes

    def _ridge(self, x: Tensor, error: Tensor) -> Tensor:
        gram = x.mT @ torch.diag(self.weight) @ x
        eye = torch.eye(len(gram), dtype=torch.float64)
        system = gram + EPSILON * gram.trace() / len(gram) * eye
        return error.mT @ torch.diag(self.weight) @ x @ torch.linalg.inv(system)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def changes(tiny: Tiny) -> dict[str, Tensor]:
    file = CalibrationFile.open(tiny.path)
    found = {}
    for name, plan in file.tensors.items():
        factors = file.change(plan)
        assert factors is not None
        found[name.removesuffix(".weight")] = factors[0].double() @ factors[1].double().mT
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_streamed_fit_equals_the_dense_one(tmp_path: Path, family: str) -> None:
    tiny = Tiny.make(tmp_path, family).using(**WHOLE)
    tiny.calibrate(dtype=torch.float64)
    expected, found = Reference(tiny).fit(), changes(tiny)
    assert found.keys() == expected.keys()
    assert max(relative(found[name], expected[name]) for name in expected) < 1e-5
