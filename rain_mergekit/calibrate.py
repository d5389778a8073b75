"""The calibration precompute: models and data in, one calibration file out, layer by layer."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import rain_mergekit
from rain_mergekit.assemble import write_file
from rain_mergekit.calibration_data import Samples, load_samples, record
from rain_mergekit.capture import Shell
from rain_mergekit.checkpoint import fingerprint
from rain_mergekit.config import RainConfig
from rain_mergekit.errors import RainError
from rain_mergekit.models import LoadOptions, Trio, check_shapes, open_trio
from rain_mergekit.parts import LayerPart, read_part, write_part
from rain_mergekit.streams import MERGED, build_streams
from rain_mergekit.walk import LayerResult, LayerWalk, Stream
from rain_mergekit.workdir import WorkDir

MIN_RANK_CAP = 96


@dataclass(frozen=True)
class RunOptions:
    """How the precompute runs; of these, only dtype and device can change a number.

    activation_budget: bytes of hidden states kept in memory, the rest goes to disk.
    snapshot_seconds: how often (at most) the state for an interrupted run's continuation is saved.
    """

    load: LoadOptions = field(default_factory=LoadOptions)
    device: str = "cpu"
    dtype: torch.dtype | None = None
    activation_budget: int = 2 * 1024**3
    snapshot_seconds: float = 60.0
    quiet: bool = False


@dataclass(frozen=True)
class Summary:
    """What a finished calibration reports; layer_passes counts samples x layers by purpose."""

    path: Path
    seconds: float
    bytes: int
    layers: int
    first_layer: int
    mean_rank: float
    samples: Samples
    layer_passes: dict[str, int]
    warnings: tuple[str, ...]


def calibrate(config: RainConfig, options: RunOptions) -> Summary:
    """Run the calibration that `config` describes and write the file that it names.

    Raises RainError for anything wrong with the input; then no calibration file is written.
    """
    start = time.monotonic()
    _check_writable(config.calibration)
    trio = open_trio(config, options.load)
    samples = load_samples(config.settings, trio)
    models = _model_records(trio)
    run = _Run(config, options, trio, samples)
    job = run.identity(models)
    with WorkDir(config.calibration, job, every=options.snapshot_seconds) as work:
        first = run.walk(work)
        parts = [read_part(work.part(index)) for index in run.indices]
        header = {
            "models": models,
            "data": record(samples),
            "settings": config.settings.model_dump(mode="json"),
        }
        warnings = write_file(config.calibration, header, parts, trio.layout, config.settings)
    return Summary(
        path=config.calibration,
        seconds=time.monotonic() - start,
        bytes=config.calibration.stat().st_size,
        layers=len(parts),
        first_layer=first,
        mean_rank=_mean_rank(parts),
        samples=samples,
        layer_passes=run.layer_passes,
        warnings=warnings,
    )


class _Run:
    """One walk through the layers; owns the streams of hidden states."""

    def __init__(
        self, config: RainConfig, options: RunOptions, trio: Trio, samples: Samples
    ) -> None:
        self._settings, self._options, self._trio = config.settings, options, trio
        self._samples = samples
        dtype = options.dtype or default_dtype(trio, options.device)
        self.shell = Shell(trio.reasoning, trio.config, dtype, options.device)
        self.indices = range(len(self.shell.layers))
        self._modules = tuple(trio.layout.kinds)
        check_shapes(trio, [self._tensor(i, m) for i in self.indices for m in self._modules])
        self._max_rank = max_rank(trio, config, len(self.indices))
        self.layer_passes: dict[str, int] = {}

    def identity(self, models: Mapping[str, Any]) -> dict[str, Any]:
        """What must be equal for an interrupted run to be continued."""
        return {
            "version": rain_mergekit.__version__,
            "models": models,
            "data": record(self._samples),
            "settings": self._settings.model_dump(mode="json"),
            "dtype": str(self.shell.dtype),
            "device": torch.device(self._options.device).type,
        }

    def walk(self, work: WorkDir) -> int:
        """All layers that are not done yet, in order; returns the first of them."""
        streams = build_streams(
            self.shell, self._samples, self._settings, self._options.activation_budget, work.path
        )
        stores = {name: stream.store for name, stream in streams.items()}
        try:
            first = work.restore(stores)
            tokens = sum(sum(store.lengths) for store in stores.values())
            with tqdm(
                total=tokens * len(self.indices),
                initial=tokens * first,
                unit="tok",
                unit_scale=True,
                disable=self._options.quiet,
            ) as progress:
                for index in self.indices[first:]:
                    progress.set_description(f"Layer {index + 1}/{len(self.indices)}")
                    result = self._layer(index, streams, progress.update)
                    write_part(work.part(index), self._name(index), result, self._shapes(index))
                    if index + 1 < len(self.indices):
                        work.save(index, stores)
        finally:
            for store in stores.values():
                store.close()
        return first

    def _layer(
        self, index: int, streams: Mapping[str, Stream], tick: Callable[[int], object]
    ) -> LayerResult:
        with self.shell.layer(index) as layer:
            walk = LayerWalk(index, layer, self._name(index), self._settings, tick)
            sites = walk.find_sites(self._modules, streams["reasoning"])
            original = [stream for name, stream in streams.items() if name != MERGED]
            collected = walk.features(sites, original)
            self._count(original)
            solved, merged = walk.solve(
                sites,
                collected,
                lambda module: self._trio.task_vector(
                    self._tensor(index, module), self.shell.device
                ),
                self._max_rank,
                replace=MERGED in streams,
            )
            result = LayerResult(sites, solved)
            if MERGED in streams and self._samples.instruction is not None:
                layer.load_state_dict(merged, strict=False, assign=True)
                result.statistics = walk.statistics(
                    streams[MERGED], self._samples.instruction.samples, self._trio.layout.heads
                )
                self._count([streams[MERGED]])
        self._trio.release()
        return result

    def _name(self, index: int) -> str:
        return f"{self.shell.prefix}.{index}"

    def _tensor(self, index: int, module: str) -> str:
        return f"{self._name(index)}.{module}.weight"

    def _shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        layer = self.shell.layers[index]
        weights = {module: layer.get_submodule(module).weight for module in self._modules}
        return {m: tuple(w.shape) for m, w in weights.items() if isinstance(w, torch.Tensor)}

    def _count(self, streams: Sequence[Stream]) -> None:
        for stream in streams:
            self.layer_passes[stream.name] = self.layer_passes.get(stream.name, 0) + len(stream)


def max_rank(trio: Trio, config: RainConfig, layers: int) -> int:
    """The rank cap: as given, or what the size budget allows (at least MIN_RANK_CAP)."""
    settings = config.settings
    if settings.max_rank is not None:
        return settings.max_rank
    attention = trio.layout.heads * trio.layout.head_dim
    widths = 2 * trio.config.hidden_size + attention + trio.config.intermediate_size
    factors = 2 if settings.projection == "oblique" else 1
    per_rank = widths * torch.float32.itemsize * factors * layers
    return max(MIN_RANK_CAP, int(settings.size_budget * trio.reasoning.bytes / per_rank))


def default_dtype(trio: Trio, device: str) -> torch.dtype:
    """float32 on the CPU (exact, and bfloat16 is slow there), else the checkpoint's own."""
    if torch.device(device).type == "cpu":
        return torch.float32
    return getattr(trio.config, "dtype", None) or torch.bfloat16


def _model_records(trio: Trio) -> dict[str, Any]:
    return {
        role: {
            "reference": str(checkpoint.reference),
            "revision": checkpoint.revision,
            "fingerprint": fingerprint(checkpoint.path),
        }
        for role, checkpoint in trio.items().items()
    }


def _mean_rank(parts: Sequence[LayerPart]) -> float:
    ranks = [int(site["rank"]) for part in parts for site in part.sites.values()]
    return sum(ranks) / len(ranks)


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise RainError(f"{path}: is a folder, expected the path of the calibration file")
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RainError(
            f"{folder}: cannot write the calibration file there ({error.strerror}); choose another "
            "`parameters.calibration`, or give yourself write permission"
        ) from None
