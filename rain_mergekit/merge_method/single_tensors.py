"""Merge single tensors of a configuration outside mergekit's own loop."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.schema import ROLES, TensorPlan
from rain_mergekit.config.method_names import AIM
from rain_mergekit.errors import RainError
from rain_mergekit.linalg.feature_rows import TASK_ROWS
from rain_mergekit.linalg.merged_weight import merged_weight
from rain_mergekit.merge_method.rain import RainMerge
from rain_mergekit.models.merge_names import Names
from rain_mergekit.models.model_tensors import ModelTensors


class TensorMerger:
    """Merges tensors by the names that transformers' modules use.

    calibration: what is applied; tensors: those of the three models by role; names: what the merge
    calls them; strength: lambda.
    """

    def __init__(
        self,
        calibration: CalibrationFile,
        tensors: Mapping[str, ModelTensors],
        names: Names,
        strength: float,
    ) -> None:
        if calibration.kind == AIM:
            raise RainError(
                f"calibration file {calibration.path!r} is for merge_method: aim, whose merges are "
                "made by mergekit alone"
            )
        self._calibration, self._tensors, self._names = calibration, tensors, names
        self._strength, self._method = strength, RainMerge()

    def listed(self, name: str) -> bool:
        """Whether the merge changes the tensor."""
        targets = [target.name for target in self._names(name)] or [name]
        return any(target in self._calibration.tensors for target in targets)

    def tensor(
        self, name: str, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Tensor:
        """One tensor of the merge on `device`; `dtype` is mergekit's, None the stored one.

        A tensor that the checkpoint holds in parts, an expert each, is merged part by part, and one
        that it holds with axes exchanged as it is stored.
        """
        place = device or torch.device("cpu")
        targets = self._names(name)
        if not any(target.shape for target in targets):
            key = targets[0].name if targets else name
            plan = self._calibration.tensors.get(key)
            if plan is not None and plan.tokens:
                return self._of_tokens(name, plan, dtype, place)
            found = {role: tensors.get(name) for role, tensors in self._tensors.items()}
            return self._merged(key, found, dtype, place)
        reasoning = self._tensors["reasoning"]
        parts = (part for part, _ in reasoning.sources[name].parts)
        keys = {part: target.name for part, target in zip(parts, targets, strict=True)}

        def part(name: str) -> Tensor:
            found = {role: tensors.checkpoint.get(name) for role, tensors in self._tensors.items()}
            return self._merged(keys[name], found, dtype, place)

        return reasoning.assembled(name, part)

    def of_tokens(self, name: str) -> bool:
        """Whether the merge changes the tensor, and its rows are tokens."""
        targets = [target.name for target in self._names(name)] or [name]
        plans = (self._calibration.tensors.get(target) for target in targets)
        return any(plan is not None and plan.tokens for plan in plans)

    def _of_tokens(
        self, name: str, plan: TensorPlan, dtype: torch.dtype | None, device: torch.device
    ) -> Tensor:
        """Computed in blocks of rows, so that only the result is in memory as a whole."""
        weights = [self._tensors[role].of_tokens(name) for role in ROLES]
        if not plan.projected:
            base = weights[0].to(device, dtype)
            return self._method.merged(self._calibration, plan, (base, base, base), self._strength)
        count = min(len(weight) for weight in weights)
        own_site = isinstance(plan.site, str)
        factors = self._calibration.factors(str(plan.site)) if own_site else None
        rows, cols = self._calibration.scale(plan.rows), self._calibration.scale(plan.cols)
        result = weights[0].to(device, dtype, copy=True)
        for start in range(0, count, TASK_ROWS):
            block = slice(start, min(count, start + TASK_ROWS))
            base, tuned, origin = (weight[block].to(device, dtype) for weight in weights)
            own = None if rows is None else rows[block]
            result[block] = merged_weight(
                (base, tuned, origin),
                factors,
                (own, cols),
                self._strength,
                gamma=self._calibration.gamma,
            )
        return result

    def _merged(
        self,
        key: str,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> Tensor:
        plan = self._calibration.tensors.get(key)
        if plan is None or not self._strength:
            return weights["reasoning"].to(device, dtype)
        # mergekit converts tensors before it computes
        base, instruct, pretrained = (weights[role].to(device, dtype) for role in ROLES)
        trio = base, instruct, pretrained
        return self._method.merged(self._calibration, plan, trio, self._strength)

    def release(self) -> None:
        """Close all shards."""
        for tensors in self._tensors.values():
            tensors.release()
