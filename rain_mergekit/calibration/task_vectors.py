"""The linear weights of the three models of a calibration: their shapes and task vectors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from rain_mergekit.capture.input_sites import LinearWeight
from rain_mergekit.errors import RainError
from rain_mergekit.linalg.feature_rows import TASK_ROWS
from rain_mergekit.linalg.finite import finite
from rain_mergekit.models.loading import Trio
from rain_mergekit.models.model_tensors import ModelTensors
from rain_mergekit.system.profile import LOAD, phase
from rain_mergekit.system.wording import counted


class TrioTensors:
    """Tensors of the three models under the names of the reasoning model's modules.

    gamma: how much of what reasoning training changed is taken from a task vector.
    """

    def __init__(self, models: Mapping[str, ModelTensors], gamma: float = 0.0) -> None:
        """models: by role, all three."""
        self._models, self._gamma = models, gamma

    @classmethod
    def of(
        cls, trio: Trio, model: nn.Module, reasoning: ModelTensors, gamma: float = 0.0
    ) -> TrioTensors:
        """From the names of the tensors of all three; no tensor is read.

        model: the reasoning model without weights, and `reasoning` its tensors.
        """
        instruct, pretrained = (ModelTensors.of(c, model) for c in (trio.instruct, trio.pretrained))
        models = {"reasoning": reasoning, "instruct": instruct, "pretrained": pretrained}
        return cls(models, gamma)

    @property
    def instruct(self) -> ModelTensors:
        """Tensors of the instruct model."""
        return self._models["instruct"]

    @property
    def pretrained(self) -> ModelTensors:
        """Tensors of the model from which the instruct model was tuned."""
        return self._models["pretrained"]

    @property
    def _read(self) -> list[ModelTensors]:
        """Those that a task vector is made of, in the order of its formula."""
        parts = {0.0: ("instruct", "pretrained"), 1.0: ("instruct", "reasoning")}
        names = parts.get(self._gamma, ("instruct", "pretrained", "reasoning"))
        return [self._models[name] for name in names]

    def task_vector(
        self, layer: str, weight: LinearWeight, expert: int | None, device: torch.device
    ) -> Iterator[Tensor]:
        """Delta of one weight in blocks of rows (n, d_in), float32, in order.

        Delta = (theta_I - theta_B) - gamma (theta_R - theta_B). expert: only this expert; None:
        all. The blocks are read when they are needed. Raises RainError for NaN or infinity.
        """
        name = f"{layer}.{weight.name}"
        shape = self._read[0].expected[name]
        every: Iterable[int | None] = range(shape[0]) if len(shape) > 2 else [None]
        for one in every if expert is None else [expert]:
            tensors = [_weight(model, name, one) for model in self._read]
            if weight.input_axis == -2:
                tensors = [tensor.mT for tensor in tensors]
            yield from self._blocks(name, tensors, device)
        # Otherwise all weights of the layer stay mapped in memory.
        for model in self._read:
            model.checkpoint.release()

    def of_tokens(self, name: str, rows: Tensor, device: torch.device) -> Iterator[Tensor]:
        """Delta of a weight with a row for each token, in blocks (n, d_in), float32.

        Only those rows that the mask says, (vocabulary) bool, and that all models have. The weight
        is never in float32 as a whole.
        """
        weights = [model.of_tokens(name) for model in self._read]
        count = min(len(rows), *map(len, weights))
        deltas = self._blocks(name, [weight[:count] for weight in weights], device)
        for delta, chosen in zip(deltas, torch.split(rows[:count], TASK_ROWS), strict=True):
            if bool(chosen.any()):
                yield delta[chosen.to(device)]

    def _blocks(
        self, name: str, weights: Sequence[Tensor], device: torch.device
    ) -> Iterator[Tensor]:
        for tuned, origin, *third in zip(
            *(torch.split(tensor, TASK_ROWS) for tensor in weights), strict=True
        ):
            # Moved in the stored type, which takes half the bytes on the way to a GPU.
            with phase(LOAD):
                delta = tuned.to(device).to(torch.float32, copy=True)
                subtracted = origin.to(device).to(torch.float32)
                delta -= subtracted
                for reasoning in third:
                    changed = reasoning.to(device).to(torch.float32) - subtracted
                    delta.sub_(changed, alpha=self._gamma)
            if not finite(delta):
                raise RainError(self._not_finite(name, [tuned, origin, *third]))
            yield delta

    def _not_finite(self, name: str, blocks: Sequence[Tensor]) -> str:
        for model, tensor in zip(self._read, blocks, strict=True):
            if not finite(tensor):
                who = f"{model.checkpoint.reference}: tensor {name}"
                return f"{who} contains NaN or Inf: the checkpoint is damaged, fetch it again"
        return f"{name}: the difference of the instruct and the pretrained model is beyond float32"

    def check(self, layers: Mapping[str, tuple[int, ...]], matrices: Collection[str]) -> None:
        """What the calibration will read is there and fits; RainError lists every problem at once.

        Args:
            layers: the shapes that the reasoning model's config asks for, of all tensors of its
                decoder layers.
            matrices: those of them that may be merged: all three models need them, as numbers.
        """
        problems = list(self._problems(layers, set(matrices)))
        if problems:
            shown = "; ".join(problems[:20])
            more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
            count = counted(len(problems), "problem")
            raise RainError(
                f"the three models do not fit together ({count}): {shown}{more}. "
                "They must be of the same family and size, and not quantised"
            )

    def _problems(
        self, layers: Mapping[str, tuple[int, ...]], matrices: Collection[str]
    ) -> Iterator[str]:
        for role, tensors in self._models.items():
            shapes = tensors.shapes(layers)
            for name, expected in layers.items():
                found = shapes.get(name)
                if found is None and (role == "reasoning" or name in matrices):
                    yield f"{role}: {name} is missing"
                elif found is not None and found != expected:
                    yield f"{role}: {name} is {list(found)}, expected {list(expected)}"
            looked_at = {*matrices, *tensors.parameters} if role == "reasoning" else matrices
            for name, kind in tensors.coded(looked_at).items():
                yield f"{role}: {name} is stored as {kind}, expected a plain weight"

    def release(self) -> None:
        """Close all shards."""
        for tensors in self._models.values():
            tensors.release()


def _weight(model: ModelTensors, name: str, expert: int | None) -> Tensor:
    """A weight of two axes, as stored; expert: the one that is wanted of a weight of three."""
    if expert is None:
        return model.get(name)
    if model.has_single_experts(name):
        return model.expert(name, expert)
    return model.get(name)[expert]
