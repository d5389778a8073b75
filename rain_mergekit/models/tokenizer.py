"""Loading a model's tokenizer, and telling whether two are the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rain_mergekit.errors import RainError
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.system.untrusted_input import first_line, read_regular

# If none of these files is there, transformers invents an empty tokenizer.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_TOKENIZER_PARTS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
# Generic classes, which do what tokenizer.json says.
_GENERIC_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")


def has_tokenizer(folder: str) -> bool:
    """Whether a model comes with a tokenizer of its own."""
    return any(Path(folder, name).exists() for name in _TOKENIZER_FILES)


def tokenizer_digest(folder: str) -> str:
    """SHA-256 of the tokenizer's files, the chat template included."""
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
        tokenizer("a")  # some fields are only checked at first use
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
