"""Digests of a merged model's tensors, with a bar: all of its weights are read."""

from __future__ import annotations

from pathlib import Path

from rain_mergekit.commands.console import Console
from rain_mergekit.commands.moving_bar import moving_bar
from rain_mergekit.models.weight_files import weight_files
from rain_mergekit.publish.record import tensor_digests


def digests_with_bar(folder: Path, console: Console) -> dict[str, str]:
    """The digests that `tensor_digests` gives, with a progress bar."""
    total = sum(path.stat().st_size for path in weight_files(folder))
    with moving_bar(total, "digests", console) as bar:
        return tensor_digests(folder, bar.update)
