"""Restore the reasoning model's tokenizer files in a merged model's folder.

Told to align vocabularies or to set a chat template, mergekit loads the tokenizer through
transformers and saves it anew. transformers may take another class than the model's, which splits
text in another way, and what belongs to the tokenizer's files but is no part of it is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.side_files import (
    GENERATION,
    TEMPLATES,
    TOKENIZER,
    copy_files,
    is_of_tokenizer,
    same_file,
    side_files,
)
from rain_mergekit.models.tokenizer import load_tokenizer, tokenizer_in

_PROBE = "Two apples, 3 pears -- how many?\n\n<think>\nFive.\n</think>\n\nFIVE (5)."


@dataclass(frozen=True)
class Restored:
    """The names of the files that were put back, and what could not be."""

    files: tuple[str, ...]
    warnings: tuple[str, ...]


def restore(reasoning: Checkpoint, folder: Path, *, own_template: bool) -> Restored:
    """Replace the tokenizer files that mergekit wrote in `folder` by the reasoning model's.

    The tokenizer's only where both have the same vocabulary: rows of the embeddings belong to it.
    own_template: the configuration sets another chat template, which stays. RainError if one of the
    two tokenizers cannot be loaded.
    """
    source = reasoning.path
    names = [GENERATION] if not (folder / GENERATION).exists() else []
    parts = {*TOKENIZER, *TEMPLATES, *filter(is_of_tokenizer, side_files(source))}
    if own_template:
        parts = {name for name in parts if name not in TEMPLATES and not name.endswith(".jinja")}
    there = [name for name in parts if (folder / name).exists()]
    if all(same_file(source, folder, name) for name in there):  # mergekit has copied some
        return Restored(copy_files(source, folder, [*names, *sorted(parts)]), ())
    names += [] if own_template else TEMPLATES
    ours, theirs = load_tokenizer(reasoning), _merged(reasoning, folder)
    if ours.get_vocab() == theirs.get_vocab():
        names += sorted(parts - {*TEMPLATES})
    files = copy_files(source, folder, names)
    if files:
        theirs = _merged(reasoning, folder)
    found = _differences(ours, theirs, own_template=own_template)
    return Restored(files, tuple(found))


def _merged(reasoning: Checkpoint, folder: Path) -> PreTrainedTokenizerBase:
    trust = reasoning.trust_remote_code
    return tokenizer_in(str(folder), "the merged model", trust_remote_code=trust)


def _differences(
    ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, *, own_template: bool
) -> Iterator[str]:
    """How the merged model's tokenizer differs, in words."""
    pieces = [t.convert_ids_to_tokens(t(_PROBE)["input_ids"]) for t in (ours, theirs)]
    if pieces[0] != pieces[1]:
        yield (
            "the merged model's tokenizer, which mergekit has built, splits text in another way "
            "than the reasoning model's: with `tokenizer: {source: base}` it is the same"
        )
    if not own_template and ours.chat_template != theirs.chat_template:
        yield "the merged model's chat template is not the reasoning model's"
