"""What stream matching will need, from shapes and token counts alone: memory, disk, operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rain_mergekit.calibration.estimate import LIBRARIES, Estimate
from rain_mergekit.calibration.fit_rule import MATRICES, FitRule
from rain_mergekit.calibration.options import MIN_RANK_CAP
from rain_mergekit.calibration.stream_texts import StreamTexts
from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.config.settings import RainSettings

FLOAT32, FLOAT64 = 4, 8
# A plain decoder has four sites: the merged stream passes a layer once for each, and once more.
_SITES = 4
# What the early ends of these passes leave out: together they are about so many whole passes.
_MERGED_PASSES = 2.4


@dataclass(frozen=True)
class StreamNeeds:
    """Passes of texts through one layer, by samples and by tokens."""

    samples: int
    tokens: int


@dataclass(frozen=True)
class StreamShape:
    """The largest layer, and all two-dimensional weights of the layers as (d_out, d_in)."""

    layers: int
    layer_parameters: int
    hidden: int
    matrices: tuple[tuple[int, int], ...]
    elements_per_rank: int
    model_bytes: int

    @classmethod
    def of(cls, layerwise: LayerwiseModel) -> StreamShape:
        """From the modules without weights and the file headers; no tensor is read."""
        layer = max(layerwise.layers, key=_size)
        return cls(
            layers=len(layerwise.layers),
            layer_parameters=_size(layer),
            hidden=layerwise.hidden_size,
            matrices=_matrices(layer),
            elements_per_rank=sum(
                sum(shape) for one in layerwise.layers for shape in _matrices(one)
            ),
            model_bytes=layerwise.checkpoint.bytes,
        )

    def rank_within(self, settings: RainSettings) -> int:
        """The largest rank of a change: as given, or what the size budget allows."""
        if settings.max_rank is not None:
            return settings.max_rank
        room = settings.size_budget * self.model_bytes
        return max(MIN_RANK_CAP, int(room / (self.elements_per_rank * FLOAT32)))

    def needs(self, texts: StreamTexts, rule: FitRule) -> StreamNeeds:
        """All passes of one layer, those that end early counted whole."""
        own = [len(text.input_ids) for text in texts.all]
        fitted = [len(text.input_ids) for text in texts.all if rule.uses(text)]
        others = [len(one.input_ids) for one in (*texts.readings, *texts.bare)]
        return StreamNeeds(
            samples=2 * len(own) + _SITES * len(fitted) + len(others),
            tokens=2 * sum(own) + _SITES * sum(fitted) + sum(others),
        )


def _size(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def _matrices(layer: nn.Module) -> tuple[tuple[int, int], ...]:
    return tuple((int(p.shape[0]), int(p.shape[1])) for p in layer.parameters() if p.dim() == 2)


def estimate_streams(
    shape: StreamShape, texts: StreamTexts, dtype: torch.dtype, rank: int, budget: int
) -> Estimate:
    """Memory, disk and operations of stream matching with changes of at most `rank`."""
    own = sum(len(text.input_ids) for text in texts.all)
    others = sum(len(one.input_ids) for one in (*texts.readings, *texts.bare))
    longest = max(len(text.input_ids) for text in texts.all)
    hidden = (2 * own + others) * shape.hidden * dtype.itemsize
    targets = own * sum(rows for rows, _ in shape.matrices) * dtype.itemsize
    kept = min(hidden, budget // 2), min(targets, budget // 2)
    width = max(width for _, width in shape.matrices)
    rows = max(rows for rows, _ in shape.matrices)
    small = min(width, rows)
    system = min(MATRICES * width**2, budget // 2)
    system += FLOAT64 * (3 * width * rows + 3 * small**2)
    passing = dtype.itemsize * longest * (8 * shape.hidden + 4 * rows)
    written = shape.elements_per_rank * rank * FLOAT32
    products = sum(2.0 * own * (r + w) * w for r, w in shape.matrices)
    # A spectrum takes about 10 d³; the two sums of a weight and its change are turned into it.
    solves = sum(10.0 * w**3 + 8.0 * w * w * r + 10.0 * min(w, r) ** 3 for r, w in shape.matrices)
    return Estimate(
        memory={
            "layers of both models": 2 * shape.layer_parameters * dtype.itemsize,
            "hidden states": kept[0],
            "targets": kept[1],
            "working space": max(system, passing),
            "libraries": LIBRARIES,
        },
        work_disk=hidden - kept[0] + targets - kept[1] + 2 * hidden + written,
        file_bytes=written,
        read_bytes=2 * shape.model_bytes,
        forward_flops=shape.layers
        * 2.0
        * shape.layer_parameters
        * (own * (1 + _MERGED_PASSES) + others),
        statistics_flops=shape.layers * (products + solves),
        rank=rank,
    )
