"""How a calibration runs: device, type, memory; and the rank cap."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from rain_mergekit.calibration.estimate import (
    file_bytes,
    head_bytes,
)
from rain_mergekit.calibration.model_shape import ModelShape
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.models.loading import LoadOptions
from rain_mergekit.system.loader_choice import MMAP

MIN_RANK_CAP = 96
MIN_RANK_CAP_EXPERTS = 32  # of stream matching where there are routed experts
# Enough for products of full speed; a GPU wants few calls.
BATCH_TOKENS, BATCH_TOKENS_GPU = 2048, 8192


@dataclass(frozen=True)
class RunOptions:
    """How a calibration runs.

    Only dtype, device, deterministic and batch_tokens can change a number in the file.

    Attributes:
        load: how the models are found and opened.
        device: where the layers run: `cpu`, `cuda`, `cuda:1`.
        dtype: of the forward pass; None: float32 on the CPU, the model's own type elsewhere.
        activation_budget: bytes for hidden states, feature rows and working space. Hidden states
            that find no room in it go to disk.
        snapshot_seconds: at most this often the state is saved from which an interrupted
            calibration continues.
        keep_on_device: hidden states within the budget stay on the device that computes.
        deterministic: the same bits whatever the number of threads. Where MKL_CBWR=AUTO,STRICT was
            not in the environment before torch was loaded, or torch has no MKL, all runs on one
            thread.
        batch_tokens: texts of similar length pass a layer together, up to so many tokens; 0: each
            alone; None: as many as suit the device. Changes rounding.
        read_ahead: the next layer is read while the present one computes; one layer more of each
            model is in memory then, as it is stored.
        loader: how layers are read ahead: `mmap`, or `fastsafetensors` where it is installed.
        experts_budget: the experts of a layer that take more bytes than this in one model, as they
            are stored, are read whenever they are used, one by one; None: never.
        quiet: no progress bar.
    """

    load: LoadOptions = field(default_factory=LoadOptions)
    device: str = "cpu"
    dtype: torch.dtype | None = None
    activation_budget: int = 2 * 1024**3
    snapshot_seconds: float = 60.0
    keep_on_device: bool = False
    deterministic: bool = False
    batch_tokens: int | None = None
    read_ahead: bool = True
    loader: str = MMAP
    experts_budget: int | None = None
    quiet: bool = False

    @property
    def tokens_together(self) -> int:
        """How many tokens of several texts pass a layer at once."""
        if self.batch_tokens is not None:
            return self.batch_tokens
        return BATCH_TOKENS if torch.device(self.device).type == "cpu" else BATCH_TOKENS_GPU


def max_rank(shape: ModelShape, settings: RainSettings) -> int:
    """The rank cap: as given, or what the size budget allows (at least MIN_RANK_CAP).

    With `rank_by: full` only an explicit `max_rank` is a bound.
    """
    if settings.max_rank is not None:
        return settings.max_rank
    if settings.rank_by == "full":
        return max(shape.widths)
    stores_v = settings.stores_v
    per_rank = file_bytes(shape, sum(shape.widths), stores_v=stores_v)
    fixed = head_bytes(shape, 0, stores_v=stores_v)
    per_rank += head_bytes(shape, 1, stores_v=stores_v) - fixed
    return max(MIN_RANK_CAP, int((settings.size_budget * shape.model_bytes - fixed) / per_rank))
