"""The shape and the workload of a real trio and its calibration sets, as `plan` wants them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import nn

from rain_mergekit.calibration_data import Samples
from rain_mergekit.capture import Shell
from rain_mergekit.plan import ModelShape, Workload
from rain_mergekit.walk import READ


def model_shape(shell: Shell, vocabulary: int = 0) -> ModelShape:
    """From the modules without weights and the file headers; no tensor is read.

    vocabulary: rows of the output head, if it is merged.
    """
    layer = max(shell.layers, key=lambda one: sum(p.numel() for p in one.parameters()))
    sites = _sites(layer)
    checkpoint = shell.checkpoint
    everything = sum(parameter.numel() for parameter in shell.model.parameters())
    return ModelShape(
        layers=len(shell.layers),
        layer_parameters=sum(parameter.numel() for parameter in layer.parameters()),
        largest_matrix=max(parameter.numel() for parameter in layer.parameters()),
        hidden=shell.hidden_size,
        heads_width=max((width for name, width in sites if "attn" in name), default=0)
        or shell.hidden_size,
        ffn=max(width for _, width in sites),
        stored_itemsize=max(1, min(8, round(checkpoint.bytes / everything))),
        model_bytes=checkpoint.bytes,
        sites=tuple((width, rows) for (_, width), rows in sites.items()),
        vocabulary=vocabulary,
    )


def _sites(layer: nn.Module) -> dict[tuple[str, int], int]:
    """Rows of the weights that presumably share an input: same parent module, same width.

    Routed experts share their input, and each has a site of its own for its output projection.
    """
    sites: dict[tuple[str, int], int] = {}
    for name, parameter in layer.named_parameters():
        parent = name.removesuffix(".weight").rpartition(".")[0]
        if parameter.dim() == 2 and name.endswith(".weight"):
            rows, width = parameter.shape
            sites[parent, width] = sites.get((parent, width), 0) + rows
        elif parameter.dim() == 3 and name.endswith("down_proj"):
            count, rows, width = parameter.shape
            sites |= {(f"{name}.{expert}", width): rows for expert in range(count)}
        elif parameter.dim() == 3 and not name.endswith(".weight"):
            sites[parent, parameter.shape[2]] = parameter.shape[0] * parameter.shape[1]
    return sites


def workload(
    samples: Samples,
    positions: Mapping[str, Sequence[Mapping[str, Sequence[int]]]],
    passes: int,
    dtype: torch.dtype,
) -> Workload:
    """Positions: by stream, for each sample its positions of use by group."""
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
    )
