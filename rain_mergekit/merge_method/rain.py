"""`merge_method: rain`, a merge method of mergekit: applies a calibration file to each tensor."""

from __future__ import annotations

import logging
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from mergekit.merge_methods.base import GroupMergeMethod, TensorGroup
from torch import Tensor

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.schema import ROLES, TensorPlan
from rain_mergekit.config.method_names import RAIN
from rain_mergekit.config.roles import assign_roles, is_proxy, proxy_roles
from rain_mergekit.errors import RainError
from rain_mergekit.linalg.factors import Factors
from rain_mergekit.linalg.finite import finite
from rain_mergekit.linalg.merged_weight import changed_experts, changed_weight, merged_weight
from rain_mergekit.merge_method.cache import BasisCache, CalibrationCache, Recent
from rain_mergekit.merge_method.merge_errors import reported
from rain_mergekit.merge_method.parameters import calibration_for, role
from rain_mergekit.merge_method.spec import Card, Planned, rain_spec, require_inputs

_SLICE = re.compile(r"\.slices\[\d+\]$")
# Under `--multi-gpu` a GPU is the default device; files must still be read to the CPU.
_HOST = "cpu"
_FETCH = ": that checkpoint is damaged, fetch it again"
_FETCH_OR_LEAVE = f"{_FETCH}; or leave the tensor as it is, by a filter of `lambda` that gives it 0"
_NARROW = ": a lower `lambda`, or `dtype: bfloat16` or float32"
STRENGTH_OF_STREAMS = (
    "lambda is not 1, but stream matching fits every layer to what the layers before it leave at "
    "lambda 1: other strengths are often worse on both sides; set rain.teacher_strength and "
    "calibrate again instead"
)
CARD = Card(RAIN, "RAIN-Merging", "https://arxiv.org/abs/2602.22538")
_ROLE = role("instruct", "pretrained")
LOG = logging.getLogger(__name__)


class RainMerge(GroupMergeMethod):  # type: ignore[misc] # mergekit publishes no types
    """RAIN-Merging (arXiv 2602.22538): W_R + λ (S_row Δ S_col)(I - U Vᵀ) for the listed tensors.

    Everything that the calibration file does not list stays the base model's, bit for bit.
    """

    def __init__(self, card: Card = CARD) -> None:
        self.card = card
        self._planned = Planned()
        self._files = CalibrationCache()
        self._bases = BasisCache()
        self._checked: Recent[None] = Recent(8)
        self._noted: Recent[None] = Recent(8)

    @cached_property
    def spec(self) -> Any:
        """How the method presents itself: mergekit's MergeMethodSpec."""
        return rain_spec(self.card, self._calibration, self._role)

    def _calibration(self, value: object) -> CalibrationFile:
        calibration = calibration_for(self.card.name, self._files, value)
        self._planned.calibration, self._planned.roles = calibration, ()
        return calibration

    def _role(self, value: object) -> str | None:
        found = _ROLE(value)
        self._planned.roles += (found,)
        return found

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Require the base model and two others; when planning, also that they fit the file.

        One other is enough if the calibration was made with the reasoning model as the pretrained
        one: mergekit shows a method each model once, and the base model without its role.
        Loaded tensors (a group named after one) may lack inputs that are optional in mergekit.
        """
        calibration, roles = self._planned.take()
        others = [model for model in input_ids if model != base_id]
        whole = group_name is None or _SLICE.search(group_name) is not None
        with reported():
            require_inputs(self.card.name, input_ids, base_id, group_name)
            if len(others) > 2 or (whole and not others):
                raise RainError(
                    f"merge_method: {self.card.name} merges exactly two models into base_model, "
                    "one with `role: instruct` and one with `role: pretrained`; found "
                    f"{len(others)}: {', '.join(map(str, others)) or 'none'}"
                )
            if calibration is not None and others and len(others) == len(roles) and not whole:
                explicit = dict(zip(others, roles, strict=True))
                self._models(calibration, base_id, others, explicit)

    def _models(
        self,
        calibration: CalibrationFile,
        base: Hashable,
        others: Sequence[Hashable],
        explicit: Mapping[Hashable, str | None],
    ) -> dict[str, Hashable]:
        """The model of each role; the first time, check that the calibration is theirs."""
        recorded = _recorded(calibration)
        models: dict[str, Hashable] = {"reasoning": base, "pretrained": base}
        if len(others) == 1:
            explicit_role = explicit.get(others[0])
            models |= proxy_roles(others[0], explicit_role, recorded, self.card.name)
        else:
            models |= assign_roles(others, explicit, recorded)
        key = (calibration, *sorted((role, model) for role, model in models.items()))
        self._checked.get(key, lambda: _check_models(calibration, models))
        return models

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one tensor; returns a copy of the base tensor where nothing is to be done."""
        self._planned.take()  # tensors merged in memory are validated first and bound afterwards
        with reported(), torch.no_grad():
            return self._merge(group, parameters)

    def _merge(self, group: TensorGroup, parameters: Mapping[str, Any]) -> Tensor:
        calibration: CalibrationFile = parameters["calibration"]
        name, base = group.metadata.name, group.base
        others = [entry.id for entry in group.non_base]
        if name is None:
            raise RainError("rain merges tensors by name: pass the tensor's name")
        plan = calibration.tensors.get(name)
        wanted = 1 if is_proxy(_recorded(calibration)) else 2
        if len(others) < wanted and plan is not None:
            found = ", ".join(str(entry.id) for entry in group.entries)
            raise RainError(f"{name}: the calibration lists it, but only {found} has it")
        models: Mapping[str, Hashable] = {}
        if len(others) >= wanted:
            models = self._models(calibration, base.id, others, parameters["role"])
        reasoning: Tensor = base.tensor
        if plan is None or parameters["lambda"] == 0:
            _require_finite(reasoning, name, f"the reasoning model {base.id}{_FETCH}")
            if parameters["lambda"] != 0:
                _warn_of_unused(group, name)
            return reasoning.clone()  # returning it would keep its whole mapped shard in memory
        tensors = {entry.id: entry.tensor for entry in group.entries}
        weights = reasoning, tensors[models["instruct"]], tensors[models["pretrained"]]
        shape = tuple(reasoning.shape)  # mergekit has made sure that all are alike
        if shape[plan.tokens :] != plan.shape[plan.tokens :]:  # of tokens there may be others
            raise RainError(
                f"{name} has shape {list(reasoning.shape)}, the calibration expects "
                f"{list(plan.shape)}: it was made for another model"
            )
        merged = self.merged(calibration, plan, weights, parameters["lambda"])
        if not finite(merged):  # as it is whenever an input is not: no pass over those is needed
            for role, weight in zip(ROLES, weights, strict=True):
                remedy = _FETCH if role == "reasoning" else _FETCH_OR_LEAVE
                _require_finite(weight, name, f"the {role} model {models[role]}{remedy}")
            _require_finite(merged, name, f"the result in {merged.dtype}{_NARROW}")
        if plan.tokens:
            _check_tokens(base.id, name, reasoning, calibration.scale(plan.rows))
        else:
            _check_source(base.id, name, reasoning)
        return merged

    def merged(
        self,
        calibration: CalibrationFile,
        plan: TensorPlan,
        weights: tuple[Tensor, Tensor, Tensor],
        strength: float,
    ) -> Tensor:
        """One matrix, or each expert of a 3-D tensor with its own basis or the shared one.

        Where a fitted change is recorded it is added, to the share of W_I - W_R that it starts
        with; a weight with nothing else takes nothing from the other two models.
        """
        device, axis = weights[0].device, plan.input_axis
        added = calibration.change(plan)
        if added is not None and strength != 1:
            self._noted.get(calibration, lambda: LOG.warning(STRENGTH_OF_STREAMS))
        if plan.start:
            return _started(weights, plan, added, strength)
        if added is not None and not plan.projected:
            return _changed(weights[0], plan, added, strength)
        if added is not None:  # both in float32, and one cast
            wide = weights[0].to(torch.promote_types(weights[0].dtype, torch.float32))
            rest, trio = replace(plan, a=None, b=None, ranks=()), (wide, *weights[1:])
            whole = self.merged(calibration, rest, trio, strength)
            return _changed(whole, plan, added, strength).to(weights[0].dtype)
        rows, cols = calibration.scale(plan.rows), calibration.scale(plan.cols)
        if plan.tokens and rows is not None:
            rows = of_length(rows, weights[0].shape[0])
        scales, gamma = (rows, cols), calibration.gamma

        def factors(site: str | None) -> Factors | None:
            return None if site is None else self._bases.get(calibration, site, device)

        if len(plan.shape) == 2 and not isinstance(plan.site, tuple):
            basis = factors(plan.site)
            return merged_weight(weights, basis, scales, strength, axis, gamma)
        sites = plan.site if isinstance(plan.site, tuple) else (plan.site,) * plan.shape[0]
        merged = torch.empty_like(weights[0])
        for expert, site in enumerate(sites):
            own = (weights[0][expert], weights[1][expert], weights[2][expert])
            merged[expert] = merged_weight(own, factors(site), scales, strength, axis, gamma)
        return merged


def _started(
    weights: tuple[Tensor, Tensor, Tensor],
    plan: TensorPlan,
    added: tuple[Tensor, Tensor] | None,
    strength: float,
) -> Tensor:
    """W_R + λ (s (W_I - W_R) + A Bᵀ), both in float32, and one cast."""
    own = weights[0].to(torch.promote_types(weights[0].dtype, torch.float32))
    trio, axis = (own, weights[1], own), plan.input_axis
    moved = merged_weight(trio, None, (None, None), strength * plan.start, axis, gamma=1.0)
    moved = moved if added is None else _changed(moved, plan, added, strength)
    return moved.to(weights[0].dtype)


def _changed(
    weight: Tensor, plan: TensorPlan, added: tuple[Tensor, Tensor], strength: float
) -> Tensor:
    if plan.tokens:
        added = of_length(added[0], weight.shape[0]), added[1]
    if plan.ranks:
        return changed_experts(weight, added, plan.ranks, strength, plan.input_axis)
    return changed_weight(weight, added, strength, plan.input_axis)


def _recorded(calibration: CalibrationFile) -> dict[str, str]:
    return {role: model.reference for role, model in calibration.models.items()}


def _check_models(calibration: CalibrationFile, models: Mapping[str, Any]) -> None:
    from rain_mergekit.merge_method.compatibility import check_models  # noqa: PLC0415 - transformers

    with torch.device(_HOST):
        check_models(calibration, models)


def _check_source(model: Hashable, name: str, tensor: Tensor) -> None:
    from rain_mergekit.merge_method.compatibility import check_source  # noqa: PLC0415 - transformers

    with torch.device(_HOST):
        check_source(model, name, tensor)


def _check_tokens(model: Hashable, name: str, tensor: Tensor, rows: Tensor | None) -> None:
    from rain_mergekit.merge_method.compatibility import check_tokens  # noqa: PLC0415 - transformers

    if rows is not None:  # otherwise all are treated alike, in any order
        with torch.device(_HOST):
            check_tokens(model, name, tensor, rows)


def of_length(rows: Tensor, count: int) -> Tensor:
    """Scales or factors (tokens, ...) for `count` tokens.

    Padding may have been removed, and new tokens are unchanged.
    """
    more = rows.new_zeros(max(0, count - len(rows)), *rows.shape[1:])
    return torch.cat([rows[:count], more])


def _require_finite(tensor: Tensor, name: str, who: str) -> None:
    if not finite(tensor):
        raise RainError(f"{name} holds NaN or infinite values in {who}")


def _warn_of_unused(group: TensorGroup, name: str) -> None:
    """Warn of NaN or infinity in tensors that the merge does not use: the file may be damaged."""
    for entry in group.non_base:
        if not finite(entry.tensor):
            LOG.warning(
                "%s holds NaN or infinite values in %s; the result takes the base model's",
                name,
                entry.id,
            )


METHOD = RainMerge(CARD)
