"""Open the three models and check that they fit together, before any work."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import torch
from mergekit.common import ModelReference
from transformers import AutoConfig

from rain_mergekit.config.merge_config import MergeRecipe
from rain_mergekit.errors import RainError
from rain_mergekit.models.adapters import merged_adapter
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.published_format import quantised_remark
from rain_mergekit.models.source import model_folder
from rain_mergekit.system.untrusted_input import first_line, read_regular, shown


def open_checkpoint(name: str, options: LoadOptions) -> Checkpoint:
    """The model of that reference, or in that folder; RainError if it cannot be found."""
    return open_model(reference_of(name), options)


def reference_of(name: str) -> ModelReference:
    """The reference of a folder, or what `parse_reference` reads; RainError as there."""
    if Path(name).is_dir():  # a folder's name may contain characters with a meaning in a reference
        return ModelReference.model_validate({"model": {"path": name}})
    return parse_reference(name)


def parse_reference(name: str) -> ModelReference:
    """A reference as mergekit writes it: `owner/name@revision+adapter`; RainError if it is none."""
    try:
        return ModelReference.parse(name)
    except (RuntimeError, ValueError) as error:
        raise RainError(f"{name}: is not a model reference: {error}") from None


# How a checkpoint is read: itself, or what it is where its weights are quantised.
View: TypeAlias = "Callable[[Checkpoint], Checkpoint]"


@dataclass(frozen=True)
class LoadOptions:
    """How checkpoints are found and opened; the names are those of mergekit's options.

    Attributes:
        transformers_cache: folder for downloaded models; None: the hub client's own.
        lora_merge_cache: folder for merged adapters; needed for a model given as `model+adapter`.
        trust_remote_code: whether Python code in a model's folder may run.
        lora_merge_dtype: type in which an adapter is merged into its base; None: the base's own.
    """

    transformers_cache: str | None = None
    lora_merge_cache: str | None = None
    trust_remote_code: bool = False
    lora_merge_dtype: str | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> LoadOptions:
        """The options of these names among those of a command, ours or mergekit's."""
        return cls(**{field.name: options[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Trio:
    """Reasoning, instruct and pretrained checkpoint, and the reasoning model's config."""

    reasoning: Checkpoint
    instruct: Checkpoint
    pretrained: Checkpoint
    config: Any

    def items(self) -> Mapping[str, Checkpoint]:
        """The checkpoints by role."""
        return {
            "reasoning": self.reasoning,
            "instruct": self.instruct,
            "pretrained": self.pretrained,
        }


def open_model(reference: ModelReference, options: LoadOptions) -> Checkpoint:
    """The checkpoint of that reference; RainError if it cannot be found.

    A model with an adapter is merged into the cache of merged adapters first.
    """
    trust, cache = options.trust_remote_code, options.lora_merge_cache
    if reference.lora is not None and cache is None:
        raise RainError(
            f"{reference}: a model with an adapter is merged into a cache first; "
            "name the folder with --lora-merge-cache"
        )
    path = model_folder(reference, options.transformers_cache, trust=trust)
    if reference.lora is not None:
        base = ModelReference(model=reference.model)
        _require_plain({"the adapter's base": quantised_remark(base, path)})
        path = merged_adapter(reference, path, str(cache), options.lora_merge_dtype, trust=trust)
    return Checkpoint.open(reference, path, trust_remote_code=trust)


def open_models(
    config: MergeRecipe, options: LoadOptions, view: View | None = None
) -> dict[str, Checkpoint]:
    """The checkpoints of a merge by role; RainError if one cannot be found.

    view: how a quantised checkpoint is read; without it such a one is a RainError.
    """
    opened = {role: open_model(reference, options) for role, reference in config.models.items()}
    if view is None:
        _require_plain({role: quantised_remark(m.reference, m.path) for role, m in opened.items()})
        return opened
    return {role: _viewed(role, checkpoint, view) for role, checkpoint in opened.items()}


def _viewed(role: str, checkpoint: Checkpoint, view: View) -> Checkpoint:
    try:
        return view(checkpoint)
    except RainError as error:
        raise RainError(f"{role}: {error}") from None


def require_plain(checkpoint: Checkpoint, name: str) -> None:
    """RainError if the weights are quantised; name: what the user calls the model."""
    reference = reference_of(name)
    _require_plain({"model": quantised_remark(reference, checkpoint.path)})


def _require_plain(remarks: Mapping[str, str | None]) -> None:
    roles: dict[str, list[str]] = {}  # one model may stand for two
    for role, text in remarks.items():
        if text is not None:
            roles.setdefault(text, []).append(role)
    if roles:
        raise RainError("; ".join(f"{' and '.join(who)}: {text}" for text, who in roles.items()))


def merged_folders(models: Mapping[str, Checkpoint]) -> dict[ModelReference, str]:
    """The folders of those models that have an adapter, merged with it."""
    found = models.values()
    return {one.reference: one.path for one in found if one.reference.lora is not None}


def open_trio(config: MergeRecipe, options: LoadOptions, view: View | None = None) -> Trio:
    """Open the checkpoints and read the reasoning model's config; no tensor is read.

    view: as for `open_models`.
    """
    opened = open_models(config, options, view)
    model_config = read_model_config(opened["reasoning"])
    require_all_layers(config, model_config)
    _require_architecture(opened["reasoning"], model_config)
    for role in ("instruct", "pretrained"):
        other = read_model_config(opened[role])
        _require_architecture(opened[role], other)
        if other.model_type != model_config.model_type:
            raise RainError(
                f"{opened[role].reference} ({role}) is a {other.model_type!r} model, but the "
                f"reasoning model is {model_config.model_type!r}; the three must share one family"
            )
    return Trio(**opened, config=model_config)


def require_all_layers(config: MergeRecipe, model_config: Any) -> None:
    """RainError if the configuration has slices that leave out the last layers."""
    if config.layers is None:
        return
    depth = getattr(model_config.get_text_config(), "num_hidden_layers", None)
    if config.layers != depth:
        raise RainError(
            f"{config.path}: slices: they have {config.layers} layers, and the reasoning model has "
            f"{depth}: rain merges all layers in their own places; merge first, cut layers "
            "afterwards"
        )


def _require_architecture(checkpoint: Checkpoint, config: Any) -> None:
    found = getattr(config, "architectures", None)
    if not isinstance(found, list) or len(found) != 1:
        raise RainError(
            f"{checkpoint.reference}: its config names {shown(found)} as `architectures`, expected "
            "a list of one: mergekit cannot merge it otherwise"
        )


def read_model_config(checkpoint: Checkpoint) -> Any:
    """The transformers config; RainError names the model if it cannot be read."""
    _check_depth(checkpoint)
    try:
        return AutoConfig.from_pretrained(
            checkpoint.path, trust_remote_code=checkpoint.trust_remote_code
        )
    except Exception as error:  # noqa: BLE001 - transformers' classes of configs raise anything
        line = first_line(error)
        raise RainError(f"{checkpoint.reference}: cannot read its config: {line}") from None


def default_dtype(config: Any, device: str) -> torch.dtype:
    """float32 on the CPU (exact, and bfloat16 is slow there), else the model's own."""
    if torch.device(device).type == "cpu":
        return torch.float32
    return getattr(config, "dtype", None) or torch.bfloat16


# Under these names configs say how many layers there are.
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")


def _check_depth(checkpoint: Checkpoint) -> None:
    """Refuse a config with more layers than the checkpoint has tensors for."""
    try:
        config = json.loads(read_regular(Path(checkpoint.path, "config.json")))
    except (OSError, ValueError, RecursionError):
        return  # transformers says what is wrong, or finds it elsewhere
    parts = [config, *(config.values() if isinstance(config, dict) else ())]
    for name, value in ((n, p.get(n)) for p in parts if isinstance(p, dict) for n in _DEPTHS):
        if isinstance(value, int) and value > len(checkpoint.names):
            raise RainError(
                f"{checkpoint.reference}: cannot read its config: {name} is {shown(value)}, but "
                f"the checkpoint has {len(checkpoint.names)} tensors"
            )
