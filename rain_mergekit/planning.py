"""The shape and the workload of a real trio and its calibration sets, as `plan` wants them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch

from rain_mergekit.calibration_data import Samples
from rain_mergekit.models import Trio
from rain_mergekit.plan import ModelShape, Workload

_LAYER = re.compile(r"(.*\blayers\.\d+)\.")


def model_shape(trio: Trio) -> ModelShape:
    """From the file headers; no tensor is read."""
    by_layer: dict[str, list[int]] = {}
    shapes = trio.reasoning.shapes(trio.reasoning.names)
    for name, shape in shapes.items():
        found = _LAYER.match(name)
        if found is not None:
            by_layer.setdefault(found[1], []).append(math.prod(shape))
    everything = sum(math.prod(shape) for shape in shapes.values())
    return ModelShape(
        layers=int(trio.config.num_hidden_layers),
        layer_parameters=max(sum(sizes) for sizes in by_layer.values()),
        largest_matrix=max(max(sizes) for sizes in by_layer.values()),
        hidden=int(trio.config.hidden_size),
        heads_width=trio.layout.heads * trio.layout.head_dim,
        ffn=int(trio.config.intermediate_size),
        stored_itemsize=max(1, round(trio.reasoning.bytes / everything)),
        model_bytes=trio.reasoning.bytes,
    )


def workload(
    samples: Samples,
    positions: Mapping[str, Sequence[Mapping[str, Sequence[int]]]],
    passes: int,
    dtype: torch.dtype,
) -> Workload:
    """Positions: by stream, for each sample its positions of use by group."""
    counts = {
        name: sum(len(rows) for groups in members for rows in groups.values())
        for name, members in positions.items()
    }
    instruction = samples.instruction.samples if samples.instruction is not None else ()
    return Workload(
        reasoning_lengths=[len(sample.input_ids) for sample in samples.reasoning.samples],
        instruction_lengths=[len(sample.input_ids) for sample in instruction],
        protected_rows=counts.get("reasoning", 0),
        instruction_rows=counts.get("instruction", 0),
        instruction_passes=passes,
        itemsize=dtype.itemsize,
    )
