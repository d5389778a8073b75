"""The reasoning model's tokenizer in a merged model's folder, as its own files have it.

Told to align vocabularies or to set a chat template, mergekit loads the tokenizer through
transformers and saves it anew. transformers may take another class than the model's, which splits
text in another way, and what belongs to the tokenizer's files but is no part of it is left out.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.tokenizer import load_tokenizer, tokenizer_in

_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("tokenizer.model", "added_tokens.json", "vocab.json", "merges.txt"),
)
_GENERATION = "generation_config.json"
_PROBE = "Two apples, 3 pears -- how many?\n\n<think>\nFive.\n</think>\n\nFIVE (5)."


@dataclass(frozen=True)
class Restored:
    """The names of the files that were put back, and what could not be."""

    files: tuple[str, ...]
    warnings: tuple[str, ...]


def restore(reasoning: Checkpoint, folder: Path, *, own_template: bool) -> Restored:
    """Put the reasoning model's files in place of what mergekit has made of them in `folder`.

    The tokenizer's only where both have the same vocabulary: rows of the embeddings belong to it.
    own_template: the configuration sets another chat template, which stays. RainError if one of the
    two tokenizers cannot be loaded.
    """
    names = [_GENERATION] if not (folder / _GENERATION).exists() else []
    if not (folder / "tokenizer_config.json").exists():
        return Restored(_copy(reasoning, folder, names), ())
    if all(_same(reasoning, folder, name) for name in (*_TOKENIZER, *_TEMPLATES)):
        return Restored(_copy(reasoning, folder, names), ())  # mergekit has copied them
    names += [] if own_template else _TEMPLATES
    ours, theirs = load_tokenizer(reasoning), _merged(reasoning, folder)
    if ours.get_vocab() == theirs.get_vocab():
        names += _TOKENIZER
    files = _copy(reasoning, folder, names)
    if files:
        theirs = _merged(reasoning, folder)
    found = _differences(ours, theirs, own_template=own_template)
    return Restored(files, tuple(found))


def _merged(reasoning: Checkpoint, folder: Path) -> PreTrainedTokenizerBase:
    trust = reasoning.trust_remote_code
    return tokenizer_in(str(folder), "the merged model", trust_remote_code=trust)


def _copy(reasoning: Checkpoint, folder: Path, names: Iterable[str]) -> tuple[str, ...]:
    """Copy those that are there and differ; returns their names."""
    copied = []
    for name in names:
        ours = Path(reasoning.path, name)
        if ours.is_file() and not _same(reasoning, folder, name):
            shutil.copyfile(ours, folder / name)
            copied.append(name)
    return tuple(copied)


def _same(reasoning: Checkpoint, folder: Path, name: str) -> bool:
    """Whether both have the same file of that name, or neither has one."""
    ours, theirs = Path(reasoning.path, name), folder / name
    if ours.is_file() and theirs.is_file():
        return ours.read_bytes() == theirs.read_bytes()
    return not ours.is_file() and not theirs.is_file()


def _differences(
    ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, *, own_template: bool
) -> Iterator[str]:
    """What the merged model's tokenizer does in another way, in words."""
    pieces = [t.convert_ids_to_tokens(t(_PROBE)["input_ids"]) for t in (ours, theirs)]
    if pieces[0] != pieces[1]:
        yield (
            "the merged model's tokenizer, which mergekit has built, splits text in another way "
            "than the reasoning model's: with `tokenizer: {source: base}` it is the same"
        )
    if not own_template and ours.chat_template != theirs.chat_template:
        yield "the merged model's chat template is not the reasoning model's"
