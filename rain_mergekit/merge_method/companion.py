"""Shared by the companions that merge task vectors into the pretrained model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from torch import Tensor

from rain_mergekit.errors import RainError
from rain_mergekit.linalg.finite import finite
from rain_mergekit.merge_method.merge_errors import reported
from rain_mergekit.merge_method.parameters import checked_parameter, mistaken_names, number
from rain_mergekit.merge_method.spec import Card, require_once

_EMBEDDINGS = ("wte", "wpe")
_HEADS = ("embed_out",)


@dataclass(frozen=True)
class TaskVectors:
    """The task vectors W_i - W_B of one tensor, each times its model's `weight`, in order.

    name: the tensor's, or nothing. deltas: of the shape of W_B, in float32, or in float64 where
    the weights are float64.
    """

    name: str
    deltas: tuple[Tensor, ...]

    @property
    def linear(self) -> bool:
        """Whether the tensor is a linear map's weight, by shape and name.

        Two dimensions, or three for experts (a convolution has a size of one); no embedding.
        """
        shape = self.deltas[0].shape
        if len(shape) not in (2, 3) or (len(shape) == 3 and min(shape[1:]) == 1):
            return False
        return not any(_is_embedding(part) for part in self.name.split("."))

    def sum(self) -> Tensor:
        """What task arithmetic adds: the sum, a new tensor."""
        total = self.deltas[0].clone()
        for delta in self.deltas[1:]:
            total += delta
        return total

    def matrices(self) -> Iterator[tuple[Tensor, ...]]:
        """The deltas as matrices (d_out, d_in): one group, or one for each expert."""
        if self.deltas[0].dim() == 2:
            yield self.deltas
        else:
            yield from zip(*self.deltas, strict=True)

    def merged(self, merge: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
        """A new tensor with what `merge` makes of the deltas of each matrix."""
        result = torch.empty_like(self.deltas[0])
        places = (result,) if result.dim() == 2 else result
        for place, deltas in zip(places, self.matrices(), strict=True):
            place.copy_(merge(deltas))
        return result


# From the task vectors and the shared parameters to what is added to W_B.
Kernel = Callable[[TaskVectors, Mapping[str, Any]], Tensor]
# From all models' tensors and the parameters to the merged tensor, like the base's.
Merge = Callable[[TensorGroup, Mapping[str, Any]], Tensor]


def by_task_vectors(kernel: Kernel) -> Merge:
    """W_B + what the kernel makes of the task vectors, computed in float32 and cast once."""

    def merge(group: TensorGroup, parameters: Mapping[str, Any]) -> Tensor:
        base: Tensor = group.base.tensor
        wide = base.to(torch.promote_types(base.dtype, torch.float32))
        weights = parameters["weight"]
        deltas = tuple(
            (entry.tensor.to(wide.dtype) - wide).mul_(weights[entry.id]) for entry in group.non_base
        )
        vectors = TaskVectors(group.metadata.name or "", deltas)
        return kernel(vectors, parameters).add_(wide).to(base.dtype)

    return merge


class CompanionMerge(GroupMergeMethod):  # type: ignore[misc] # mergekit publishes no types
    """A method that merges tuned models into their pretrained one, `base_model`."""

    def __init__(self, card: Card, merge: Merge, spec: Any) -> None:
        """spec: mergekit's MergeMethodSpec."""
        self.card, self._merged, self.spec = card, merge, spec

    @classmethod
    def of(
        cls,
        card: Card,
        merge: Merge,
        parameters: Sequence[ParameterSpec],
        per_model: Mapping[str, Callable[[Any], Any]] | None = None,
    ) -> CompanionMerge:
        """parameters: for all models; per_model: a check of each that a model has besides `weight`.

        Other parameters are refused by name.
        """
        scope = ParameterScope.NON_BASE
        each = [checked_parameter("weight", float, scope, 1.0, number("weight"))]
        each += [
            checked_parameter(name, str, scope, None, check)
            for name, check in (per_model or {}).items()
        ]
        names = [parameter.name for parameter in parameters]
        own = [*names, *(parameter.name for parameter in each)]
        known = f"{', '.join(names)} for all, and each model's {' and '.join(own[len(names) :])}"
        spec = MergeMethodSpec(
            name=card.name,
            pretty_name=card.title,
            reference_url=card.paper,
            parameters=(*parameters, *each, *mistaken_names(own, known)),
            contract=InputContract(BasePolicy.REQUIRED, min_inputs=2, min_non_base=1),
            optional_tensor_policy=OptionalTensorPolicy.BASE_OR_SKIP,
        )
        return cls(card, merge, spec)

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Require the pretrained model as the base and at least one other, none of them twice."""
        name, where = self.spec.name, f" ({group_name})" if group_name else ""
        others = [model for model in input_ids if model != base_id]
        with reported():
            if base_id is None or base_id not in input_ids:
                raise RainError(
                    f"merge_method: {name} needs `base_model`, the pretrained model from which "
                    f"all others were tuned{where}"
                )
            if not others:
                raise RainError(
                    f"merge_method: {name} needs a model besides base_model under `models:`{where}"
                )
            require_once(input_ids, where)

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one tensor; a new one like the base's."""
        with reported(), torch.no_grad():
            return self._merge(group, parameters)

    def _merge(self, group: TensorGroup, parameters: Mapping[str, Any]) -> Tensor:
        base: Tensor = group.base.tensor
        if not base.numel():
            return base.clone()
        try:
            merged = self._merged(group, parameters)
        except (torch.linalg.LinAlgError, RainError):  # type: ignore[attr-defined]
            if all(finite(entry.tensor) for entry in group.entries):
                raise
            raise RainError(_not_finite(group)) from None
        name = group.metadata.name
        if finite(merged):  # as it is not whenever an input is not: no pass over those is needed
            return merged
        if all(finite(entry.tensor) for entry in group.entries):
            raise RainError(
                f"{name} holds NaN or infinite values in the result in {merged.dtype}: a lower "
                "`lambda`, or `dtype: bfloat16` or float32"
            )
        raise RainError(_not_finite(group))


def _not_finite(group: TensorGroup) -> str:
    found = next(entry.id for entry in group.entries if not finite(entry.tensor))
    name = group.metadata.name
    return f"{name} holds NaN or infinite values in {found}: fetch that checkpoint again"


def _is_embedding(part: str) -> bool:
    return part in _EMBEDDINGS or ("embed" in part and part not in _HEADS)
