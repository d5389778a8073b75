"""A checkpoint's tensors under the names that transformers' modules use.

A checkpoint may name them otherwise, or hold one tensor an expert where the module has one for all;
transformers publishes the conversions, and they are applied a tensor at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from rain_mergekit.errors import RainError
from rain_mergekit.models.checkpoint import PLAIN_TYPES, Checkpoint
from rain_mergekit.models.empty_model import embedding_weight
from rain_mergekit.models.experts import expert_weights


@dataclass
class Source:
    """What one tensor of the model is made of: checkpoint names and patterns, and how."""

    parts: list[tuple[str, str | None]]
    converter: Any = None

    @property
    def name(self) -> str | None:
        """The only checkpoint tensor, if it is taken as it stands."""
        return self.parts[0][0] if self.converter is None else None

    @property
    def counts(self) -> Counter[str | None]:
        """How many parts each pattern has."""
        return Counter(pattern for _, pattern in self.parts)

    def of_expert(self, index: int) -> list[tuple[str, str | None]]:
        """Part `index` of each pattern, where a pattern has one part an expert."""
        own = ([part for part in self.parts if part[1] == pattern] for pattern in self.counts)
        return [parts[index] for parts in own]


class ModelTensors:
    """Reads tensors of `checkpoint` by the names of `model` (built without weights).

    Of the last conversion the result is kept, for readers that want one expert after the other.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: nn.Module,
        shapes: dict[str, tuple[int, ...]],
        sources: Mapping[str, Source],
    ) -> None:
        """shapes: of the whole model's tensors; at times others take the place of its layers."""
        self.checkpoint, self.sources = checkpoint, sources
        self._model: Any = model
        self.expected = shapes
        self._last: dict[str, Tensor] = {}

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: nn.Module) -> ModelTensors:
        """From the names of the checkpoint's tensors and transformers' conversions."""
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return cls(checkpoint, model, shapes, _sources(checkpoint.names, model, shapes))

    @property
    def known(self) -> frozenset[str]:
        """The names of all tensors of the model."""
        return frozenset(self.expected)

    @property
    def parameters(self) -> frozenset[str]:
        """The names of all weights; buffers are not among them."""
        return frozenset(name for name, _ in self._model.named_parameters(remove_duplicate=False))

    @property
    def unknown(self) -> tuple[str, ...]:
        """Tensors of the checkpoint that are in no tensor of the model, by their own names.

        For example layers for multi-token prediction.
        """
        used = {part for source in self.sources.values() for part, _ in source.parts}
        return tuple(sorted(self.checkpoint.names - used, key=_natural))

    def shapes(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Shapes of those of the named tensors that can be read, without reading them."""
        known = {name: self.sources[name] for name in names if name in self.sources}
        direct = {source.name: name for name, source in known.items() if source.name is not None}
        shapes = {direct[key]: s for key, s in self.checkpoint.shapes(direct).items()}
        converted = {
            name: self.expected[name] for name, source in known.items() if source.converter
        }
        return shapes | converted

    def coded(self, names: Iterable[str]) -> dict[str, str]:
        """Those of the named tensors that are quantised, with their stored type.

        They cannot be merged.
        """
        parts = {part: n for n in names if n in self.sources for part, _ in self.sources[n].parts}
        types = self.checkpoint.types(parts)
        return {parts[part]: kind for part, kind in types.items() if kind not in PLAIN_TYPES}

    def get(self, name: str) -> Tensor:
        """One tensor on the CPU, as stored; RainError names the model if it is missing."""
        source = self.source(name)
        if source.name is not None:
            return self.checkpoint.get(source.name)
        if name not in self._last:
            read = self.checkpoint.get
            self._last = self._converted(name, source, read, self.expected[name])
        return self._last[name]

    def has_single_experts(self, name: str) -> bool:
        """Whether each expert of a weight of several can be read without the others.

        Not where a conversion does more than put experts and their parts beside one another: it may
        look at the shape of the whole.
        """
        source = self.sources.get(name)
        if source is None:
            return False
        if source.name is not None:
            return True
        count = self.expected[name][0]
        return _puts_beside(source.converter) and all(
            parts == count for parts in source.counts.values()
        )

    def expert(self, name: str, index: int) -> Tensor:
        """The weight of one expert on the CPU, as stored; no other is read."""
        source = self.source(name)
        if source.name is not None:
            return self.checkpoint.part(source.name, index)
        alone = Source(source.of_expert(index), source.converter)
        shape = (1, *self.expected[name][1:])
        return self._converted(name, alone, self.checkpoint.get, shape)[name][0]

    def stored_bytes(self, name: str) -> int:
        """What a tensor takes as it is stored, or as it is after it has been dequantised."""
        return sum(self.checkpoint.sizes(part for part, _ in self.source(name).parts).values())

    def source(self, name: str) -> Source:
        """What that tensor is made of; RainError names the model if it is missing."""
        source = self.sources.get(name)
        if source is None:
            raise RainError(f"{self.checkpoint.reference}: tensor {name} is not in the checkpoint")
        return source

    @property
    def embedding(self) -> str:
        """The name of the embedding of tokens."""
        return embedding_weight(self._model)

    def of_tokens(self, name: str) -> Tensor:
        """A weight with a row for each token, as stored: the embedding where `name` is missing.

        An output head that is not in the checkpoint is the embedding, and mergekit takes it so.
        """
        return self.get(name if name in self.sources else self.embedding)

    def assembled(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """One converted tensor from parts that `read` gives by their names in the checkpoint."""
        return self._converted(name, self.sources[name], read, self.expected[name])[name]

    def _converted(
        self,
        name: str,
        source: Source,
        read: Callable[[str], Tensor],
        expected: tuple[int, ...],
    ) -> dict[str, Tensor]:
        converter = deepcopy(source.converter)
        first = _first_target(name, converter)
        for key, pattern in source.parts:
            converter.add_tensor(first, key, pattern, partial(read, key))
        found: Mapping[str, Any] = converter.convert(
            first, model=self._model, config=self._model.config
        )
        tensors = {key: t[0] if isinstance(t, list) else t for key, t in found.items()}
        if name not in tensors or tuple(tensors[name].shape) != expected:
            raise RainError(
                f"{self.checkpoint.reference}: {name} cannot be assembled from "
                f"{len(source.parts)} tensors of the checkpoint (the first: {source.parts[0][0]})"
            )
        return tensors

    def twin(self) -> ModelTensors:
        """The same tensors through files that are opened anew, for another thread."""
        other = copy(self)
        other.checkpoint, other._last = self.checkpoint.twin(), {}  # noqa: SLF001 - of this class
        return other

    def release(self) -> None:
        """Close the open shard and free the last conversion."""
        self._last = {}
        self.checkpoint.release()


def has_single_experts(model: nn.Module) -> bool:
    """Whether each expert of a model can be read without the others, as far as its modules tell."""
    names = expert_weights(model)
    known: Iterable[Any] = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    turned = [
        target
        for one in known
        if isinstance(one, WeightConverter) and not _puts_beside(one)
        for target in one.target_patterns
    ]
    return bool(names) and not any(target in name for name in names for target in turned)


def _puts_beside(converter: Any) -> bool:
    """Whether a conversion only puts experts and their parts beside one another."""
    return all(isinstance(one, (MergeModulelist, Concatenate)) for one in converter.operations)


def _sources(
    names: Iterable[str], model: Any, known: dict[str, tuple[int, ...]]
) -> dict[str, Source]:
    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
    prefix = model.base_model_prefix
    found: dict[str, Source] = {}
    for name in sorted(names, key=_natural):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = name, None
        if pattern is None:
            if renamed in known:
                found[renamed] = Source([(name, None)])
            continue
        converter = by_pattern[pattern]
        for target in converter.target_patterns:
            full = renamed.replace(converter.target_patterns[0], target)
            found.setdefault(full, Source([], converter)).parts.append((name, pattern))
    return {name: source for name, source in found.items() if name in known}


def _first_target(name: str, converter: Any) -> str:
    """The name under which a conversion with several results is asked for."""
    first, *others = converter.target_patterns
    target = next((other for other in others if other in name), None)
    return name if target is None else name.replace(target, first)


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Expert 10 comes after expert 9."""
    return tuple((int(p), "") if p.isdigit() else (-1, p) for p in name.split("."))
