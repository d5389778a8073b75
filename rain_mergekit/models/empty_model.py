"""A causal language model of any family without its weights, and where its decoder layers are."""

from __future__ import annotations

import sys
from copy import deepcopy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from rain_mergekit.errors import RainError
from rain_mergekit.models import attention, experts

# Encoders of other modalities have layer lists too.
_OTHER_TOWERS = ("vision", "visual", "image", "audio", "speech", "encoder")
_LIST_NAMES = ("layers", "h", "blocks")


def empty_model(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """The model on the meta device, with our attention and experts where its family lets us.

    A family that computes attention by itself (Falcon, BLOOM, MPT, GPT-J) keeps its own; the
    hidden states are the same, but its attention cannot be observed. RainError if transformers does
    not know the architecture.
    """
    attention.register()
    experts.register()
    ours = {"attn_implementation": attention.NAME, "experts_implementation": experts.NAME}
    try:
        model = _build(config, dtype, trust_remote_code, ours)
        layers, _ = decoder_layers(model, config)
        if _has_attention_interface(layers):
            name = attention.name_for(layers)
            if name == attention.NAME:
                return model
            return _build(config, dtype, trust_remote_code, {**ours, "attn_implementation": name})
    except (LookupError, ValueError, ArithmeticError, RuntimeError, TypeError):
        pass  # the family has a table of attention classes without ours; or reported below
    ours.pop("attn_implementation")
    try:
        return _build(config, dtype, trust_remote_code, ours)
    except Exception as error:  # noqa: BLE001 - the model's own code, on whatever its config says
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RainError(
            f"transformers cannot build the architecture {config.model_type!r}: {line}"
        ) from None


def _build(config: Any, dtype: torch.dtype, trust: bool, ours: dict[str, str]) -> nn.Module:
    auto = _auto_class(config, trust=trust)
    with init_empty_weights(include_buffers=False), no_init_weights():
        model: nn.Module = auto.from_config(
            deepcopy(config), dtype=dtype, trust_remote_code=trust, **ours
        )
    return model.eval()


def _auto_class(config: Any, *, trust: bool) -> Any:
    """The auto class to build with: text only, or image and text if the checkpoint has images.

    Some families have both for one config; `architectures` says which one the checkpoint is.
    """
    named = list(getattr(config, "architectures", None) or ())
    known = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type, ())
    if set(named) & ({known} if isinstance(known, str) else {*known}):
        return AutoModelForImageTextToText
    # As transformers asks; the keys themselves would import a module of each of 190 families.
    causal = type(config) in AutoModelForCausalLM._model_mapping  # noqa: SLF001
    return AutoModelForCausalLM if causal or trust else AutoModelForImageTextToText


def _has_attention_interface(layers: nn.ModuleList) -> bool:
    homes = {type(module).__module__ for layer in layers for module in layer.modules()}
    return any(hasattr(sys.modules.get(home), "ALL_ATTENTION_FUNCTIONS") for home in homes)


def decoder_layers(model: nn.Module, config: Any) -> tuple[nn.ModuleList, str]:
    """The list of the language model's decoder layers and its name; RainError if there is none."""
    count = int(text_config(config).num_hidden_layers)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and name.rpartition(".")[2] in _LIST_NAMES
        and not any(part.startswith(_OTHER_TOWERS) for part in name.split("."))
    ]
    fitting = [item for item in found if len(item[1]) == count] or found
    if not fitting or not fitting[0][1]:
        raise RainError(f"{type(model).__name__}: found no list of {count} decoder layers")
    name, layers = fitting[0]
    return layers, name


def text_config(config: Any) -> Any:
    """The part of a config for the language model; the config itself if it has no parts."""
    return config.get_text_config(decoder=True)


def output_head(model: Any) -> tuple[str, nn.Module]:
    """The module that gives next-token logits and its name; RainError if there is none."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head and head is not None:
            return name, module
    raise RainError(f"{type(model).__name__}: found no head that gives next-token logits")


def embedding_weight(model: Any) -> str:
    """The name of the weight with the embedding of each token."""
    embedding = model.get_input_embeddings()
    return next(f"{name}.weight" for name, part in model.named_modules() if part is embedding)
