"""Layers by way of the library fastsafetensors: several threads read into the device's memory.

Beside mapped files, which are the default: there one thread reads, and a GPU gets its weights by a
copy from pinned memory.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rain_mergekit.errors import RainError
from rain_mergekit.models.model_tensors import ModelTensors
from rain_mergekit.system.loader_choice import MMAP
from rain_mergekit.system.untrusted_input import first_line

LOG = logging.getLogger(__name__)
_CHUNK = 256 * 1024**2  # bytes read at a time; a larger tensor is a chunk of its own


class ThreadedFiles:
    """Reads many tensors of one model at once, as they are stored, into the device's memory."""

    def __init__(self, tensors: ModelTensors, device: str) -> None:
        """tensors: of a checkpoint that is not quantised; device: `cpu`, or a GPU's number too."""
        self._tensors, self._device = tensors, device

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Those tensors of the model on the device; RainError names the file that is broken.

        A tensor that is put together from several of the checkpoint is, once they are there; they
        are let go of one after the other.
        """
        sources = {name: self._tensors.source(name) for name in names}
        left = Counter(part for source in sources.values() for part, _ in source.parts)
        stored = self._stored(left)

        def take(part: str) -> Tensor:
            left[part] -= 1
            return stored[part] if left[part] else stored.pop(part)

        return {
            name: self._tensors.assembled(name, take) if source.name is None else take(source.name)
            for name, source in sources.items()
        }

    def _stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by their names in the checkpoint, of as many files as they lie in."""
        index = self._tensors.checkpoint.index
        by_file: dict[str, set[str]] = defaultdict(set)
        for name in names:
            by_file[index.tensor_paths[name]].add(name)
        found: dict[str, Tensor] = {}
        for file, wanted in sorted(by_file.items()):
            found |= self._of_file(os.path.join(index.base_path, file), wanted)
        return found

    def _of_file(self, path: str, wanted: set[str]) -> dict[str, Tensor]:
        largest = max(self._tensors.checkpoint.sizes(wanted).values())
        try:
            from fastsafetensors import ParallelLoader  # noqa: PLC0415 - an extra

            loader: Any = ParallelLoader(
                None,
                [path],
                queue_size=-1,  # one chunk at a time: this is a thread of its own already
                use_tqdm_on_load=False,
                device=self._device,
                nogds=True,  # by pinned memory, which needs no driver of its own
                set_numa=False,  # which would bind the whole process to the GPU's node
                tensor_filter=wanted.__contains__,
                all_local=True,  # each process of several reads for itself
                max_batch_bytes=max(largest, _CHUNK),
            )
            loader._log_message = _unsaid  # noqa: SLF001 - it prints, also where --json is asked for
            weights: Any = loader.iterate_weights()
            try:
                return dict(weights)
            finally:
                weights.close()  # first: it holds what is being read
                loader.close()
        except Exception as error:  # noqa: BLE001 - the library raises no narrower one
            raise RainError(
                f"{path}: fastsafetensors cannot read it: {first_line(error)}; read it with "
                f"--loader {MMAP}"
            ) from None


def numbered(device: torch.device) -> str:
    """The device with its number, which the library needs of a GPU: `cuda` is the present one.

    To be asked in the thread that computes: each thread has a present one of its own.
    """
    name = str(device)
    return f"cuda:{torch.cuda.current_device()}" if name == "cuda" else name


def _unsaid(message: str, *_: object, **__: object) -> None:
    LOG.debug("fastsafetensors: %s", message)
