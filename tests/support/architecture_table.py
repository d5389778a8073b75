"""The table of docs/architectures.md, made from models.

`python tests/support/architecture_table.py` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from architectures import FAMILIES, auto_class, family_config, layers_of, run_whole
from torch import Tensor, nn

from rain_mergekit.capture.input_sites import SiteMap, capture_inputs, site_name
from rain_mergekit.capture.left_alone import left_alone
from rain_mergekit.models import attention, experts
from rain_mergekit.models.attention import AttentionCall, observe_attention
from rain_mergekit.models.empty_model import empty_model
from rain_mergekit.models.head_layout import HeadLayout, WeightKind

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
START, END = "<!-- table -->\n", "<!-- end -->\n"
HEAD = """| architecture | stage 1: projected | stage 2: by head | stays the reasoning model's |
|---|---|---|---|
"""


def rows() -> Iterator[str]:
    """One line a family, as the package sees a small random model of it."""
    for family in FAMILIES:
        found = look(family)
        cells = (f"`{family}`", *(listed(names) for names in found))
        yield f"| {' | '.join(cells)} |\n"


def look(family: str) -> tuple[list[str], list[str], list[str]]:
    """Weights that are projected, those of them with heads, and those that stay."""
    attention.register()
    experts.register()
    torch.manual_seed(0)
    config = family_config(family)
    # The way the package would build it tells whether its attention can be observed.
    empty = empty_model(config, torch.float32)
    chosen = getattr(empty.config, "_attn_implementation", "eager")
    model = auto_class(config).from_config(
        config, attn_implementation=chosen, experts_implementation=experts.NAME
    )
    _, layers = layers_of(model.eval())
    maps, heads = [SiteMap() for _ in layers], Heads(layers, family)
    with observe_attention(heads):
        for layer, sites in zip(layers, maps, strict=True):
            observe(layer, sites)
        run_whole(model, range(10, 22))
    projected, by_head, left = [], [], []
    for index, (layer, sites) in enumerate(zip(layers, maps, strict=True)):
        for name, parameter in layer.named_parameters():
            if parameter.dim() < 2:
                continue
            weight = sites.weights.get(name)
            (left if weight is None else projected).append(site_name(name))
            layout = heads.found.get(index)
            if weight is not None and layout is not None:
                kind = layout.kind(site_name(name), weight.matrix)
                by_head += [site_name(name)] if kind is not WeightKind.LAYER else []
    return projected, by_head, left


def observe(layer: nn.Module, sites: SiteMap) -> None:
    """Watch the layer while it runs, and only then."""
    stack = ExitStack()

    def start(_module: nn.Module, _args: Any) -> None:
        stack.enter_context(capture_inputs(layer, sites, _ignore, lambda: 12, left_alone))

    layer.register_forward_pre_hook(start)
    layer.register_forward_hook(lambda _module, _args, _output: stack.close())


class Heads:
    """Which layer computed attention that could be observed, and with what heads."""

    def __init__(self, layers: nn.ModuleList, family: str) -> None:
        self._layers, self._family = layers, family
        self.found: dict[int, HeadLayout] = {}

    def __call__(self, call: AttentionCall) -> None:
        for index, layer in enumerate(self._layers):
            for name, module in layer.named_modules():
                if module is call.module:
                    h = call.heads
                    self.found[index] = HeadLayout(
                        name, h.heads, h.kv_heads, h.width, h.value_width, self._family
                    )


def _ignore(_site: str, _inputs: Tensor, _tokens: Any) -> None:
    pass


def listed(names: list[str]) -> str:
    """Modules by their parents: `self_attn` q_proj, k_proj; `mlp` ..."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        parent, _, last = name.rpartition(".")
        groups.setdefault(parent, []).append(last)
    parts = [
        f"`{parent}`: {', '.join(last)}" if parent else ", ".join(last)
        for parent, last in groups.items()
    ]
    return "; ".join(parts) or "-"


def page(text: str) -> str:
    """The page with its table replaced."""
    table = START + HEAD + "".join(rows()) + END
    return re.sub(f"{re.escape(START)}.*{re.escape(END)}", lambda _: table, text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
