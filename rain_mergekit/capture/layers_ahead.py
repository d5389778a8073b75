"""The next layer of a model is read from the disk while the present one computes.

One thread reads for all models of a run, one layer ahead in each, in the order in which the layers
are asked for. What it reads are the same bytes, converted by the same code, so that reading ahead
changes no number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from rain_mergekit.capture.file_loader import ThreadedFiles, numbered
from rain_mergekit.models.model_tensors import ModelTensors
from rain_mergekit.system.loader_choice import MMAP
from rain_mergekit.system.profile import LOAD, moved, phase

_PAGE = 4096
KEPT_MAPPED = 1 << 20  # bytes: smaller tensors may stay mapped until their layer has been read
StoredLayer = dict[str, Tensor]


class ReaderThread:
    """The thread; a context manager, which waits for what is being read at the moment."""

    def __init__(self, loader: str = MMAP) -> None:
        """loader: one of LOADERS, how it reads."""
        self.loader = loader
        self._pool = ThreadPoolExecutor(1, "layer-reader")

    def __enter__(self) -> ReaderThread:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, read: Callable[[int], StoredLayer], index: int) -> Future[StoredLayer]:
        """Read that layer when everything that was asked for before has been read."""
        context = copy_context()  # so that the phases of the thread are seen by the profile
        return self._pool.submit(context.run, _timed, read, index)


def _timed(read: Callable[[int], StoredLayer], index: int) -> StoredLayer:
    with phase(LOAD):
        return read(index)


class LayersAhead:
    """The layers `indices` of one model, in this order; never more than one waits to be taken."""

    def __init__(
        self, read: Callable[[int], StoredLayer], indices: Sequence[int], thread: ReaderThread
    ) -> None:
        self._read, self._left, self._thread = read, deque(indices), thread
        self._next: tuple[int, Future[StoredLayer]] | None = None

    @classmethod
    def begin(
        cls, read: Callable[[int], StoredLayer], indices: Sequence[int], thread: ReaderThread
    ) -> LayersAhead:
        """Begin to read the first of them."""
        ahead = cls(read, indices, thread)
        ahead._begin()
        return ahead

    def take(self, index: int) -> StoredLayer | None:
        """That layer, as soon as it has been read; the next one is begun.

        None if another layer was expected: then the caller reads by itself. What went wrong while
        it was read is raised here.
        """
        if self._next is None or self._next[0] != index:
            return None
        future, self._next = self._next[1], None
        found = future.result()
        self._begin()
        return found

    def _begin(self) -> None:
        if self._left:
            index = self._left.popleft()
            self._next = index, self._thread.submit(self._read, index)


class Stage:
    """Where tensors wait until they are used: in main memory, or already on the device.

    A GPU gets them by a stream of its own from pinned memory, while it computes.
    """

    def __init__(self, device: torch.device, stream: Any) -> None:
        """stream: of torch.cuda, for the copies; None where the device is no GPU."""
        self._device, self._stream = device, stream
        self._pinned: list[Tensor] = []

    @classmethod
    def of(cls, device: torch.device) -> Stage:
        """A stage with a stream of its own where the device is a GPU."""
        cuda: Any = torch.cuda  # its streams have no type information
        return cls(device, cuda.Stream(device) if device.type == "cuda" else None)

    def put(self, tensor: Tensor) -> Tensor:
        """The same tensor, read from its file and on its way to the device."""
        if self._stream is None:
            touch(tensor)
            return tensor
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
        self._pinned.append(pinned)
        with torch.cuda.stream(self._stream):
            return pinned.to(self._device, non_blocking=True)

    def arrived(self) -> None:
        """Wait until all tensors have arrived on the device."""
        if self._stream is not None:
            self._stream.synchronize()
        self._pinned.clear()


@dataclass(frozen=True)
class LayerReader:
    """Reads layers of a model as they are stored, through open files of its own.

    names: the tensors of a layer, by its index; tensors: those of the model; files: reads them
    by several threads, None: from mapped files.
    """

    names: Callable[[int], Iterable[str]]
    tensors: ModelTensors
    stage: Stage
    files: ThreadedFiles | None = None

    @classmethod
    def of(
        cls,
        names: Callable[[int], Iterable[str]],
        tensors: ModelTensors,
        device: torch.device,
        loader: str,
    ) -> LayerReader:
        """Reads by that loader; what is quantised is dequantised from mapped files in any case."""
        threaded = loader != MMAP and tensors.checkpoint.plain
        files = ThreadedFiles(tensors, numbered(device)) if threaded else None
        return cls(names, tensors, Stage.of(device), files)

    def read(self, index: int) -> StoredLayer:
        """All tensors of one layer, by name; called in the reader's thread."""
        if self.files is not None:
            found = self.files.read(self.names(index))
            moved(LOAD, sum(tensor.nbytes for tensor in found.values()))
            return found
        found = StoredLayer()
        for name in self.names(index):
            stored = self.tensors.get(name)
            moved(LOAD, stored.nbytes)
            found[name] = self.stage.put(stored)
            if stored.nbytes > KEPT_MAPPED:
                self.tensors.release()  # so that each is let go of by itself
        self.tensors.release()
        self.stage.arrived()
        return found


def use(tensor: Tensor) -> Tensor:
    """The tensor; its memory is not given away before the present CUDA stream is done with it."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor


def touch(tensor: Tensor) -> None:
    """Read every page of a mapped tensor, so that nobody waits for the disk later."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if flat.numel():
        int(flat[::_PAGE].sum())
