"""Make a merged model's folder equal to the reasoning model's, except for the weights.

mergekit writes `config.json` as the installed transformers does, rebuilds tokenizers
and copies a list of known files. Everything beside the weights comes from the reasoning model's own
folder here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rain_mergekit.errors import RainError
from rain_mergekit.merge_method.tokenizer_files import Restored, restore
from rain_mergekit.models.config_file import (
    published_config,
    read_config_file,
    without_quantisation,
    write_config_file,
)
from rain_mergekit.models.model_tensors import ModelTensors
from rain_mergekit.models.side_files import (
    GENERATION,
    copy_files,
    is_of_tokenizer,
    side_files,
)
from rain_mergekit.models.weight_files import shapes_of


@dataclass(frozen=True)
class Finished:
    """config: whether it was written anew; files: the others that were put right.

    warnings: what could not be restored.
    """

    config: bool
    files: tuple[str, ...]
    warnings: tuple[str, ...]


def finish_files(
    folder: Path,
    reasoning: ModelTensors,
    *,
    dtype: str | None,
    tokenizer: bool = True,
    own_template: bool = False,
) -> Finished:
    """Restore all files besides the weights in `folder`; idempotent.

    Args:
        folder: the merged model's.
        reasoning: the reasoning model's checkpoint.
        dtype: the type of the merged weights; None for the reasoning model's.
        tokenizer: whether the result is to have a tokenizer.
        own_template: the configuration sets another chat template, which stays.

    Raises:
        RainError: the reasoning model has no config that can be read.
    """
    source = reasoning.checkpoint.path
    config = _finish_config(folder, reasoning, dtype)
    restored = Restored((), ())
    if tokenizer:
        try:
            restored = restore(reasoning.checkpoint, folder, own_template=own_template)
        except RainError as error:
            text = f"the tokenizer's files stay as mergekit wrote them: {error}"
            restored = Restored((), (text,))
    own = [name for name in side_files(source) if _wanted(folder, name, tokenizer)]
    files = (*restored.files, *copy_files(source, folder, own))
    return Finished(config, files, restored.warnings)


def _wanted(folder: Path, name: str, tokenizer: bool) -> bool:
    """Whether a file of the reasoning model is to be copied: what is there already stays.

    The tokenizer's are looked at together, elsewhere: they belong to one vocabulary.
    """
    if is_of_tokenizer(name) or (name == GENERATION and not tokenizer):
        return False
    return not (folder / name).exists()


def _finish_config(folder: Path, reasoning: ModelTensors, dtype: str | None) -> bool:
    """Write the config, key for key; returns whether that changed it."""
    original = read_config_file(reasoning.checkpoint.path)
    if not reasoning.checkpoint.plain:
        original = without_quantisation(original)
    wanted = published_config(original, dtype=dtype, vocabulary=_vocabulary(folder, reasoning))
    if (folder / "config.json").exists() and read_config_file(folder) == wanted:
        return False
    write_config_file(folder, wanted)
    return True


def _vocabulary(folder: Path, reasoning: ModelTensors) -> tuple[int, int] | None:
    """The number of tokens before and after; None where the merge has not changed it."""
    source = reasoning.sources.get(reasoning.embedding)
    if source is None or source.name is None:
        return None
    before = reasoning.checkpoint.shapes([source.name])[source.name]
    after = shapes_of(folder, [source.name]).get(source.name)
    return None if after is None or after == before else (before[0], after[0])
