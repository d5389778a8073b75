"""The names that mergekit gives to a model's tensors, and the tensors that it omits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

from mergekit.architecture import arch_info_for_config
from mergekit.architecture.conversion import can_convert_checkpoint_keys

from rain_mergekit.errors import RainError
from rain_mergekit.models.model_tensors import ModelTensors, Source

# Buffers that older checkpoints carry and that every model computes anew.
_DERIVED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias", "attention.bias")


@dataclass(frozen=True)
class Target:
    """One tensor of the merge.

    expert, shape: where it is a part of a tensor of the model; first: where its outputs begin among
    the expert's. shape alone: where the checkpoint holds the model's tensor with its last two axes
    exchanged, and so does the merge.
    """

    name: str
    expert: int | None = None
    shape: tuple[int, ...] = ()
    first: int = 0


_LAYER = re.compile(r"\.\d+\.")
Names: TypeAlias = Callable[[str], "tuple[Target, ...]"]


def merge_names(config: Any, tensors: ModelTensors) -> Names:
    """The names under which mergekit merges a tensor of the model; none if it leaves it out.

    Where mergekit has no table for the architecture it takes the model's own names. Of these it
    leaves out what is not in the checkpoint under that very name and not in every layer, like the
    experts of models that begin with dense layers, or is stored in a way that it cannot convert.
    """
    listed = listed_names(config)
    templates = Counter(_template(name) for name in tensors.known)
    depth = max(templates.values())
    found = Found.of(tensors.checkpoint.names, config.model_type)

    @cache  # matching the keys of a layer with hundreds of experts takes a while
    def names(name: str) -> tuple[Target, ...]:
        if listed is None and name not in tensors.known:
            return ()
        if listed is None:
            everywhere = not _LAYER.search(name) or templates[_template(name)] == depth
            there = name in tensors.checkpoint.names or (everywhere and found(name))
            return (Target(name, shape=_exchanged(name, tensors)),) if there else ()
        source = tensors.sources.get(name, Source([]))
        single = [name] if source.converter else [name, *(part for part, _ in source.parts)]
        known = next((listed[candidate] for candidate in single if candidate in listed), None)
        if known is not None:
            return (Target(known, shape=_exchanged(name, tensors)),)
        return _experts(source, listed, tensors)

    return names


def _exchanged(name: str, tensors: ModelTensors) -> tuple[int, ...]:
    """The stored shape where it is the model's with the last two axes exchanged, else nothing."""
    source = tensors.sources.get(name)
    if source is None or not source.converter or len(source.parts) != 1:
        return ()
    part = source.parts[0][0]
    stored, own = tensors.checkpoint.shapes([part])[part], tensors.shapes([name])[name]
    return stored if stored != own and stored == (*own[:-2], own[-1], own[-2]) else ()


class Found:
    """Which tensors mergekit finds in a checkpoint: by their names, or by a conversion.

    It asks transformers for conversions by the type of the model alone, and knows no prefix that
    only some of an architecture's checkpoints have.
    """

    def __init__(self, by_layer: Mapping[str | None, Collection[str]], model_type: str) -> None:
        self._by_layer, self._type = by_layer, model_type

    @classmethod
    def of(cls, names: Iterable[str], model_type: str) -> Found:
        """Of the names in a checkpoint, and the type of model that its config names."""
        by_layer: dict[str | None, set[str]] = {}
        for name in names:
            by_layer.setdefault(layer_of(name), set()).add(name)
        return cls(by_layer, model_type)

    def named(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of that very name."""
        return name in self._by_layer.get(layer_of(name), ())

    def __call__(self, name: str) -> bool:
        """Whether it finds the tensor, which the result will have under that name."""
        # All keys of a large model at once would take minutes.
        near = set(self._by_layer.get(layer_of(name), ()))
        return name in near or can_convert_checkpoint_keys(self._type, near, name)


def layer_of(name: str) -> str | None:
    """The part of a name that says which layer it is in, such as `.3.`; None outside of layers."""
    found = _LAYER.search(name)
    return None if found is None else found[0]


def _template(name: str) -> str:
    """The name with the layer left open, as mergekit groups names."""
    return _LAYER.sub(".*.", name, count=1)


def _experts(
    source: Source, listed: Mapping[str, str], tensors: ModelTensors
) -> tuple[Target, ...]:
    """The tensors of single experts in the checkpoint that the model holds as one tensor."""
    if any(part not in listed for part, _ in source.parts):
        return ()
    shapes = tensors.checkpoint.shapes(part for part, _ in source.parts)
    targets, counts = [], dict.fromkeys((pattern for _, pattern in source.parts), 0)
    first = _first_outputs(source, shapes)
    for part, pattern in source.parts:
        targets.append(Target(listed[part], counts[pattern], shapes[part], first[pattern]))
        counts[pattern] += 1
    return tuple(targets)


def _first_outputs(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> dict[str | None, int]:
    """By pattern, where its outputs begin: transformers lays them after one another, in order."""
    if source.converter is None:  # a tensor that is stored as it is has no pattern
        return {None: 0}
    rows = {pattern: shapes[part][0] for part, pattern in source.parts}
    order = [one for one in source.converter.source_patterns if one in rows]
    return {one: sum(rows[before] for before in order[:n]) for n, one in enumerate(order)}


def has_table(config: Any) -> bool:
    """Whether mergekit has a table of the architecture's names."""
    return bool(config.architectures) and arch_info_for_config(config) is not None


def listed_names(config: Any) -> dict[str, str] | None:
    """Every name in mergekit's table for the architecture, with the name that it writes.

    None for an architecture without a table. RainError if mergekit's own table fails.
    """
    architecture = arch_info_for_config(config) if config.architectures else None
    if architecture is None:
        return None
    listed: dict[str, str] = {}
    for weight in _table(architecture, config):
        for name in (weight.name, *(weight.aliases or ()), *(weight.tied_names or ())):
            listed.setdefault(name, weight.name)
    return listed


def _table(architecture: Any, config: Any) -> Iterable[Any]:
    try:
        weights: Iterable[Any] = architecture.all_weights(config)
    except (RuntimeError, AttributeError, TypeError) as error:
        line = str(error).strip().splitlines()[0]
        raise RainError(
            f"mergekit cannot merge the architecture {config.model_type!r} by any method: its "
            f"table does not fit the config that transformers reads ({line:.100})"
        ) from None
    return weights


def left_out(tensors: ModelTensors, names: Names) -> dict[str, tuple[str, ...]]:
    """Tensors of the checkpoint that a merge leaves out, under whatever merge method.

    Under the model's names, with what the checkpoint calls each or its parts; those that no class
    knows come first, under their own. mergekit writes what its architecture file lists; e.g. it
    lists no attention biases for Llama.
    """
    parts = {name: tuple(p for p, _ in source.parts) for name, source in tensors.sources.items()}
    parts |= {name: (name,) for name in tensors.unknown}
    return {
        name: parts[name]
        for name in sorted(parts, key=lambda name: (name not in tensors.unknown, name))
        if not names(name) and not name.endswith(_DERIVED)
    }


def lost_tensors(tensors: ModelTensors, names: Names) -> tuple[str, ...]:
    """The checkpoint's names of all that a merge leaves out."""
    return tuple(part for parts in left_out(tensors, names).values() for part in parts)


def lost_warning(lost: Sequence[str]) -> str:
    """One sentence for the user."""
    shown = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
    return (
        f"mergekit leaves out {len(lost)} tensors of the reasoning model "
        f"({shown}) under every merge method: `mergekit-rain merge` adds them afterwards; a model "
        "merged with mergekit-yaml will lack them until `mergekit-rain finish` adds them"
    )
