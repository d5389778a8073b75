"""How many threads a command uses: the given number, or by the size of its model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from rain_mergekit.errors import RainError
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.empty_model import text_config
from rain_mergekit.models.loading import read_model_config
from rain_mergekit.system.threads import threads_for


def threads_for_model(model: Checkpoint, wanted: int | None = None) -> AbstractContextManager[None]:
    """Inside the block torch has `wanted` threads; None: as many as suit the model."""
    try:
        size = getattr(text_config(read_model_config(model)), "hidden_size", None)
    except RainError:  # opening the model later reports the error
        size = None
    return nullcontext() if size is None else threads_for(int(size), wanted)
