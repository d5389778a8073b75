"""Finishing a merged model's folder; behind `finish`, `merge` and `sweep`."""

from __future__ import annotations

from pathlib import Path

from rain_mergekit.commands.console import Console
from rain_mergekit.config.merge_config import MergeRecipe, read_recipe
from rain_mergekit.errors import RainError
from rain_mergekit.merge_method.finish import finish_files
from rain_mergekit.merge_method.missing_tensors import Completion
from rain_mergekit.models.config_file import NAME
from rain_mergekit.models.loading import LoadOptions
from rain_mergekit.models.weight_files import weight_files, write_index
from rain_mergekit.system.wording import counted


def finish_folder(merged: str, options: LoadOptions, console: Console) -> bool:
    """Put right what stock mergekit wrote; says whether anything was changed.

    RainError if the folder is no merge of rain.

    Without a config no program takes the folder for a model, so it is removed first and written
    last: what is interrupted can be done again.
    """
    folder = Path(merged)
    config = read_recipe(folder)
    if not weight_files(folder):
        raise RainError(f"{merged}: holds no weights; merge into it first")
    completion = Completion.of(config, options)
    weights = completion.to_do(folder)
    if weights:
        (folder / NAME).unlink(missing_ok=True)
        told_of_added(completion.write(folder, config), console)
        write_index(folder)
    files = finish_beside_weights(config, folder, completion, console)
    changed = bool(weights) or files
    console.heading(f"{'Finished' if changed else 'Nothing to change in'} {merged}")
    return changed


def told_of_added(added: tuple[str, ...], console: Console) -> None:
    """Which tensors were added, by name."""
    if added:
        more = f", {added[1]}" + (", ..." if len(added) > 2 else "") if len(added) > 1 else ""
        console.print(
            f"Added {counted(len(added), 'tensor')} that mergekit leaves out: {added[0]}{more}"
        )


def finish_beside_weights(
    config: MergeRecipe,
    folder: Path,
    completion: Completion,
    console: Console,
    *,
    tokenizer: bool = True,
) -> bool:
    """config.json and all other files; says whether any was changed. A merge is not lost for it."""
    settings = config.merge
    try:
        found = finish_files(
            folder,
            completion.reasoning,
            dtype=settings.out_dtype or settings.dtype,
            tokenizer=tokenizer,
            own_template=bool(settings.chat_template),
        )
    except (OSError, RainError) as error:
        console.warn(f"the files beside the weights stay as mergekit wrote them: {error}")
        return False
    if found.files:
        console.print(f"Put back as the reasoning model has them: {', '.join(found.files)}")
    for text in found.warnings:
        console.warn(text)
    return bool(found.files) or found.config
