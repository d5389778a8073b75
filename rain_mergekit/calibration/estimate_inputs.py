"""The shapes of the models and the sizes of the calibration sets, for the estimate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rain_mergekit.calibration.estimate import Workload
from rain_mergekit.calibration.estimate_site import SiteShape
from rain_mergekit.calibration.model_shape import ModelShape
from rain_mergekit.calibration.protected_positions import READ
from rain_mergekit.calibration.samples import Samples
from rain_mergekit.capture.input_sites import Leave
from rain_mergekit.capture.left_alone import left_alone
from rain_mergekit.models.empty_model import text_config
from rain_mergekit.models.head_layout import feeds_attention
from rain_mergekit.models.model_tensors import has_single_experts
from rain_mergekit.models.outline import ModelOutline
from rain_mergekit.text.token_positions import InstructionTokens

# What families call the number of experts, and how many of them a token goes through.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k")


def model_shape(outline: ModelOutline, vocabulary: int = 0) -> ModelShape:
    """The shapes by the modules without weights and the file headers; no tensor is read.

    vocabulary: rows of the output head, if it is merged.
    """
    layer = max(outline.layers, key=lambda one: sum(p.numel() for p in one.parameters()))
    share, alone = experts_share(outline.config), has_single_experts(outline.model)
    sites = _sites(layer, share)
    return ModelShape(
        layers=len(outline.layers),
        layer_parameters=sum(parameter.numel() for parameter in layer.parameters()),
        largest_matrix=max(
            p[0].numel() if alone and of_experts(n, p) else p.numel()
            for n, p in layer.named_parameters()
        ),
        hidden=outline.hidden_size,
        heads_width=max((site.width for name, site in sites if "attn" in name), default=0)
        or outline.hidden_size,
        ffn=max(site.width for _, site in sites),
        stored_itemsize=outline.stored_itemsize,
        model_bytes=outline.bytes,
        sites=tuple(site for _, site in sites),
        vocabulary=vocabulary,
        active=int(
            sum(p.numel() * (share if of_experts(n, p) else 1) for n, p in layer.named_parameters())
        ),
        experts=tuple(p.numel() for n, p in layer.named_parameters() if of_experts(n, p)),
        single=largest_expert(layer) if alone else 0,
        besides=max(
            sum(p.numel() for n, p in one.named_parameters() if not of_experts(n, p))
            for one in outline.layers
        ),
    )


def largest_expert(layer: nn.Module) -> int:
    """Weights of the largest tensor of one routed expert of the layer; 0 where it has none."""
    return max((p[0].numel() for n, p in layer.named_parameters() if of_experts(n, p)), default=0)


def of_experts(name: str, parameter: nn.Parameter) -> bool:
    """Whether the tensor holds all routed experts; a convolution has three axes too."""
    return parameter.dim() == 3 and not name.endswith(".weight")


class MapInput(NamedTuple):
    """What a linear map sees, told from its name and shape: equal for maps of one site.

    Maps presumably see the same input that have the same parent module and width, and all or none
    of which make queries, keys or values (`reads`): the attention's output is as wide as these and
    sees another input.
    """

    parent: str
    width: int
    reads: bool


def map_input(
    layer: nn.Module, name: str, parameter: nn.Parameter, leave: Leave
) -> tuple[MapInput, int] | None:
    """The input of a linear map of the layer, and d_out; None for other tensors and left ones."""
    if parameter.dim() != 2 or not name.endswith(".weight"):
        return None
    module = name.removesuffix(".weight")
    rows, width = straight(layer.get_submodule(module), parameter)
    if leave(name, rows, width):
        return None
    return MapInput(module.rpartition(".")[0], width, feeds_attention(module)), rows


def _sites(layer: nn.Module, share: float) -> list[tuple[str, SiteShape]]:
    """Each site with the name of the module around it, in order.

    Weights that the projection leaves alone have none. Routed experts share an input, and each has
    a site of its own for its output projection, which the share of the tokens reaches.
    """
    sites: dict[MapInput, SiteShape] = {}
    for name, parameter in layer.named_parameters():
        found = map_input(layer, name, parameter, left_alone)
        if found is not None:
            seen, rows = found
            known = sites.get(seen, SiteShape(seen.width, 0))
            sites[seen] = SiteShape(seen.width, known.outputs + rows, 1.0, seen.reads)
        elif of_experts(name, parameter):
            module, _, last = name.rpartition(".")
            count, rows, width = straight(layer.get_submodule(module), parameter)
            if last.endswith("down_proj"):
                own = SiteShape(width, rows, share)
                sites |= {MapInput(f"{name}.{n}", width, reads=False): own for n in range(count)}
                continue
            block = MapInput(module.rpartition(".")[0], width, reads=False)
            known = sites.get(block, SiteShape(width, 0))
            sites[block] = SiteShape(width, known.outputs + count * rows)
    return [(seen.parent, site) for seen, site in sites.items()]


def straight(module: nn.Module, parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape (..., d_out, d_in) of a weight, whichever way round the module holds it."""
    *first, rows, width = parameter.shape if parameter.dim() > 1 else (1, *parameter.shape)
    transposed = isinstance(module, Conv1D) or getattr(module, "is_transposed", False)
    return (*first, width, rows) if transposed else (*first, rows, width)


def experts_share(config: Any) -> float:
    """Which share of the tokens a routed expert gets if all get the same; 1 where unknown."""
    config = text_config(config)
    chosen, count = (
        next((n for name in names if isinstance(n := getattr(config, name, None), int)), 0)
        for names in (_CHOSEN, _EXPERTS)
    )
    return min(1.0, chosen / count) if chosen and count else 1.0


def workload(
    samples: Samples,
    positions: Mapping[str, Sequence[Mapping[str, Sequence[int]]]],
    passes: int,
    dtype: torch.dtype,
    compared: Sequence[InstructionTokens],
) -> Workload:
    """Positions: by stream, for each sample its positions of use by group.

    compared: the texts that two of the models read in the end.
    """
    counts = Counter[str]()
    for stream, members in positions.items():
        for name, rows in chain.from_iterable(groups.items() for groups in members):
            counts["reading" if name in READ else stream] += len(rows)
    instruction = samples.instruction.samples if samples.instruction is not None else ()
    return Workload(
        reasoning_lengths=[len(sample.input_ids) for sample in samples.reasoning.samples],
        instruction_lengths=[len(sample.input_ids) for sample in instruction],
        protected_rows=counts["reasoning"],
        instruction_rows=counts["instruction"],
        instruction_passes=passes,
        itemsize=dtype.itemsize,
        reading_rows=counts["reading"],
        compared_lengths=[len(sample.input_ids) for sample in compared],
    )
