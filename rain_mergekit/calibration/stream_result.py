"""What one layer of stream matching contributes to the calibration file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rain_mergekit.calibration.expert_fit import ExpertsFit
from rain_mergekit.calibration.layer_experts import ExpertChange
from rain_mergekit.linalg.ridge_solver import LowRankChange


@dataclass(frozen=True)
class StreamLayerResult:
    """What one layer contributes to the calibration file, by the weights' names in the layer.

    starts: the share of (instruct - reasoning) that a weight has beside its change, where it has.
    left: linear maps that are not fitted and stay the reasoning model's. fitted and held_out: the
    relative error of the merged stream by group of tokens, on texts of both kinds. expert_changes:
    by the name of the parameter; experts: what became of each expert, by module.
    """

    changes: Mapping[str, LowRankChange]
    starts: Mapping[str, float]
    shapes: Mapping[str, tuple[int, ...]]
    input_axes: Mapping[str, int]
    left: tuple[str, ...]
    fitted: Mapping[str, float]
    held_out: Mapping[str, float]
    expert_changes: Mapping[str, ExpertChange]
    experts: Mapping[str, ExpertsFit]
