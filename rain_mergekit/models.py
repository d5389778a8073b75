"""The three models of one calibration, checked against each other before any work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rain_mergekit.checkpoint import Checkpoint, first_line
from rain_mergekit.config import RainConfig
from rain_mergekit.errors import RainError
from rain_mergekit.inputs import read_regular, shown


@dataclass(frozen=True)
class LoadOptions:
    """How checkpoints are found and opened; the names are those of mergekit's options."""

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
    """The checkpoint of that reference; RainError if it cannot be found."""
    return Checkpoint(
        reference,
        cache_dir=options.transformers_cache,
        lora_cache_dir=options.lora_merge_cache,
        lora_merge_dtype=options.lora_merge_dtype,
        trust_remote_code=options.trust_remote_code,
    )


def open_trio(config: RainConfig, options: LoadOptions) -> Trio:
    """Open the checkpoints and read the reasoning model's config; no tensor is read."""
    opened = {role: open_model(reference, options) for role, reference in config.models.items()}
    model_config = read_model_config(opened["reasoning"])
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


# Under these names configs say how many layers there are.
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")


def _check_depth(checkpoint: Checkpoint) -> None:
    """Layers without tensors would be built all the same, however many the config asks for."""
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


# Without any of them transformers makes an empty tokenizer up.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_TOKENIZER_PARTS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
# Classes that say nothing but "as tokenizer.json has it".
_GENERIC_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")


def has_tokenizer(folder: str) -> bool:
    """Whether a model comes with a tokenizer of its own."""
    return any(Path(folder, name).exists() for name in _TOKENIZER_FILES)


def tokenizer_digest(folder: str) -> str:
    """SHA-256 of the files that say how a conversation becomes tokens, the chat template too."""
    digest = hashlib.sha256()
    for name in sorted({*_TOKENIZER_FILES, *_TOKENIZER_PARTS}):
        path = Path(folder, name)
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The reasoning model's tokenizer, from the checkpoint's own folder.

    AutoTokenizer replaces the class that some model types declare by the registered one; where the
    folder declares a generic class, tokenizer.json is the authority and is obeyed as it stands.
    """
    trust = checkpoint.trust_remote_code
    return tokenizer_in(checkpoint.path, str(checkpoint.reference), trust_remote_code=trust)


def tokenizer_in(path: str, name: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; RainError calls the model by `name`."""
    try:
        tokenizer = _tokenizer_class(path).from_pretrained(
            path, trust_remote_code=trust_remote_code
        )
        tokenizer("a")  # some fields are looked at when it is used for the first time
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises nothing narrower
        raise RainError(f"{name}: cannot load its tokenizer: {first_line(error)}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise RainError(f"{name}: its tokenizer is a {type(tokenizer).__name__}")
    return tokenizer


def _tokenizer_class(path: str) -> Any:
    try:
        text = read_regular(Path(path, "tokenizer_config.json")).decode("utf-8")
        declared = json.loads(text).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        return AutoTokenizer
    generic = declared in _GENERIC_TOKENIZERS and Path(path, "tokenizer.json").exists()
    return PreTrainedTokenizerFast if generic else AutoTokenizer
