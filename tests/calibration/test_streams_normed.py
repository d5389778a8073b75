"""Stream matching through a norm between a map and the residual stream, against a dense fit.

Written from the formula: the stream after the map is h + g * z / rms(z). The errors of the
regression are r g / (g² + 0.01 mean(g²)), with r what the stream lacks, less their part along z,
and its inputs are those of the map over rms(z).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from test_streams_exact import WHOLE, Reference, agree
from tiny import Tiny
from torch import Tensor

WRITERS = {
    "self_attn.o_proj": ("after attention", "post_attention_layernorm"),
    "mlp.down_proj": ("after mlp", "post_feedforward_layernorm"),
}
# A norm's scale by its weight.
FAMILIES: dict[str, Callable[[Tensor], Tensor]] = {
    "gemma2": lambda weight: 1 + weight,
    "gemma3_text": lambda weight: 1 + weight,
    "olmo2": lambda weight: weight,
}


class Normed(Reference):
    """The dense fit of a family whose maps pass a norm on their way to the residual stream."""

    scale: Callable[[Tensor], Tensor]

    def fit_site(self, index: int, members: Sequence[str]) -> dict[str, Tensor]:
        if not set(members) <= WRITERS.keys():
            return super().fit_site(index, members)
        (member,) = members
        name = f"model.layers.{index}.{member}"
        stream, norm = WRITERS[member]
        now = self.run(self.merged, self.own, [text.ids for text in self.texts])
        x = torch.cat([inputs[name] for inputs, _ in now])
        z = torch.cat([outputs[name] for _, outputs in now])
        key = f"model.layers.{index}.{stream}"
        lack = self.targets(key) - torch.cat([outputs[key] for _, outputs in now])
        g = self.scale(self.merged.get_submodule(f"model.layers.{index}.{norm}").weight.detach())
        rms = z.square().mean(1, keepdim=True).sqrt()
        error = lack * g / (g.square() + 0.01 * g.square().mean())
        across = torch.eye(z.shape[1], dtype=z.dtype) - torch.stack(
            [torch.outer(row, row) / row.dot(row) for row in z]
        )
        error = torch.stack([one @ row for one, row in zip(across, error, strict=True)])
        change = self._ridge(name, x / rms, error)
        with torch.no_grad():
            self.merged.get_submodule(name).weight += change
        return {name: change}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_streamed_fit_through_a_norm_equals_the_dense_one(tmp_path: Path, family: str) -> None:
    tiny = Tiny.make(tmp_path, "qwen2", model_type=family, head_dim=12).using(**WHOLE)
    reference = Normed(tiny)
    reference.scale = FAMILIES[family]
    agree(tiny, reference)
