"""The next layer is read while one computes: by order, by counting, by simulated bandwidth."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hangs import HANGS
from safetensors.torch import load_file
from tiny import Tiny

from rain_mergekit.calibration import layer, layer_passes
from rain_mergekit.capture.layers_ahead import LayerReader, LayersAhead, ReaderThread, touch
from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.errors import RainError
from rain_mergekit.models.model_tensors import ModelTensors

LAYERS = 5


@pytest.fixture(scope="module", name="deep")
def _deep(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Stored in bfloat16 and computed in float32, as on most CPUs; several shards."""
    folder = tmp_path_factory.mktemp("deep")
    return Tiny.make(folder, "qwen2", torch.bfloat16, shard="60KB", num_hidden_layers=LAYERS)


@pytest.mark.parametrize("fit", ["streams", "projection"])
def test_reading_ahead_changes_no_bit(deep: Tiny, fit: str) -> None:
    found = []
    for ahead in (False, True):
        tiny = deep.using(f"{fit}-{ahead}.rain.safetensors", fit=fit)
        tiny.calibrate(read_ahead=ahead)
        found.append(load_file(tiny.path))
    without, read = found
    assert without.keys() == read.keys()
    assert all(torch.equal(tensor, read[name]) for name, tensor in without.items())


@dataclass
class Meeting:
    """Layer k computes only once k + 1 is being read, which is read only once k computes."""

    computing: list[threading.Event] = field(default_factory=list)
    reading: list[threading.Event] = field(default_factory=list)
    met: int = 0

    def __post_init__(self) -> None:
        for events in (self.computing, self.reading):
            events.extend(threading.Event() for _ in range(LAYERS))

    def read(self, index: int) -> None:
        self.reading[index].set()
        if index:
            assert self.computing[index - 1].wait(HANGS)

    def compute(self, index: int) -> None:
        self.computing[index].set()
        if index + 1 < LAYERS:
            assert self.reading[index + 1].wait(HANGS)
            self.met += 1


@pytest.mark.parametrize("fit", ["streams", "projection"])
def test_a_layer_computes_while_the_next_is_read(
    deep: Tiny, fit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each side waits for the other: without overlap this would never end."""
    meeting = Meeting()
    read, fill = LayerReader.read, LayerwiseModel.layer

    def reading(self: Any, index: int) -> Any:
        meeting.read(index)
        return read(self, index)

    @contextmanager
    def computing(self: Any, index: int) -> Iterator[Any]:
        with fill(self, index) as module:
            meeting.compute(index)
            yield module

    monkeypatch.setattr(LayerReader, "read", reading)
    monkeypatch.setattr(LayerwiseModel, "layer", computing)
    deep.using(f"met-{fit}.rain.safetensors", fit=fit).calibrate()
    assert meeting.met >= LAYERS - 1


@dataclass
class Simulation:
    """A disk and a processor of given rates, driven by what a real run asks of them, in its order.

    load: seconds a layer; compute: seconds a pass of a text through a layer.
    """

    load: float
    compute: float
    main: float = 0.0
    disk: float = 0.0
    loads: int = 0
    passes: int = 0
    ready: dict[tuple[int, int], float] = field(default_factory=dict)

    def asked(self, model: int, index: int) -> None:
        self.disk = max(self.disk, self.main) + self.load
        self.ready[model, index] = self.disk
        self.loads += 1

    def taken(self, model: int, index: int) -> None:
        self.main = max(self.main, self.ready[model, index])

    def pass_on(self, run: Any, *arguments: Any) -> Any:
        self.main += self.compute
        self.passes += 1
        return run(*arguments)


def simulate(tiny: Tiny, simulation: Simulation) -> None:
    """A calibration whose requests and passes drive the simulation."""
    with pytest.MonkeyPatch.context() as patch:
        submit, take = ReaderThread.submit, LayersAhead.take

        def asking(self: Any, read: Any, index: int) -> Any:
            simulation.asked(id(read.__self__), index)
            return submit(self, read, index)

        def taking(self: Any, index: int) -> Any:
            simulation.taken(id(self._read.__self__), index)
            return take(self, index)

        patch.setattr(ReaderThread, "submit", asking)
        patch.setattr(LayersAhead, "take", taking)
        for home in (layer, layer_passes):
            patch.setattr(home, "run_layer", partial(simulation.pass_on, home.run_layer))
        tiny.calibrate()


@pytest.mark.parametrize("fit", ["streams", "projection"])
@pytest.mark.parametrize("ratio", [0.2, 1.0, 5.0])
def test_the_time_is_that_of_the_slower_one(deep: Tiny, fit: str, ratio: float) -> None:
    """With rates so that loading takes `ratio` times as long as computing, or the reverse.

    What cannot hide is the first layer of each model; with five layers that is a fifth of the
    loading, so its share is taken off, as it vanishes with depth. Without the comparison of
    answers before the fit of streams, which is mostly reading.
    """
    alike = {"stream_emphasis": "even", "teacher_margin": None} if fit == "streams" else {}
    tiny = deep.using("simulated.rain.safetensors", fit=fit, **alike)
    counted = Simulation(load=0.0, compute=0.0)
    simulate(tiny, counted)
    assert counted.loads == LAYERS * (2 if fit == "streams" else 1)
    timed = Simulation(load=ratio / counted.loads, compute=1.0 / counted.passes)
    simulate(tiny, timed)
    first = timed.load * timed.loads / LAYERS
    assert timed.main - first <= 1.15 * max(ratio, 1.0)
    assert timed.main >= max(ratio, 1.0)


def held(model: LayerwiseModel) -> int:
    """Bytes of a model's layers that are in memory: filled ones, and the one that was read."""
    filled = sum(p.nbytes for p in model.layers.parameters() if not p.is_meta)
    ahead = model._ahead._next if model._ahead else None
    waiting = ahead[1].result().values() if ahead else ()
    return filled + sum(tensor.nbytes for tensor in waiting)


@dataclass
class Watch:
    """The most bytes of layers that each model of a calibration holds while a text passes one."""

    models: list[LayerwiseModel] = field(default_factory=list)
    peaks: dict[int, int] = field(default_factory=dict)

    def calibrate(self, tiny: Tiny) -> None:
        ahead = LayerwiseModel.reading_ahead

        def noting(model: LayerwiseModel, *arguments: Any) -> Any:
            self.models.append(model)
            return ahead(model, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LayerwiseModel, "reading_ahead", noting)
            for home in (layer, layer_passes):
                patch.setattr(home, "run_layer", partial(self.passing, home.run_layer))
            tiny.calibrate()

    def passing(self, run: Any, *arguments: Any) -> Any:
        for one in self.models:
            self.peaks[id(one)] = max(self.peaks.get(id(one), 0), held(one))
        return run(*arguments)


@pytest.mark.parametrize("fit", ["streams", "projection"])
def test_two_layers_of_each_model_are_in_memory_whatever_its_depth(
    tmp_path: Path, fit: str
) -> None:
    most = []
    for depth in (2, 6):
        watch = Watch()
        watch.calibrate(
            Tiny.make(tmp_path / str(depth), "qwen2", num_hidden_layers=depth).using(fit=fit)
        )
        most.append(sorted(watch.peaks.values()))
        shapes = [p.numel() for p in watch.models[0].layers[0].parameters()]
        assert most[-1]
        assert max(most[-1]) <= 2 * 4 * sum(shapes)
    assert most[0] == most[1]


def test_what_went_wrong_is_raised_where_the_layer_is_needed() -> None:
    def read(index: int) -> dict[str, torch.Tensor]:
        if index == 1:
            raise RainError("a broken shard")
        return {"weight": torch.ones(index + 1)}

    with ReaderThread() as thread:
        layers = LayersAhead.begin(read, [0, 1, 2], thread)
        first = layers.take(0)
        assert first is not None
        assert first["weight"].numel() == 1
        with pytest.raises(RainError, match="a broken shard"):
            layers.take(1)
        assert layers.take(2) is None  # the caller reads by itself
    assert not [one for one in threading.enumerate() if one.name.startswith("layer-reader")]


def test_a_layer_that_was_not_expected_is_left_to_the_caller() -> None:
    with ReaderThread() as thread:
        layers = LayersAhead.begin(lambda _: {}, [3], thread)
        assert layers.take(2) is None
        assert layers.take(3) == {}


def test_a_shard_that_breaks_while_it_is_read_ahead_is_one_sentence(
    deep: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = ModelTensors.get

    def breaking(self: ModelTensors, name: str) -> torch.Tensor:
        if name.startswith("model.layers.2.") and threading.current_thread().name != "MainThread":
            raise RainError("layer 2 cannot be read")
        return get(self, name)

    monkeypatch.setattr(ModelTensors, "get", breaking)
    with pytest.raises(RainError, match="layer 2 cannot be read"):
        deep.using("broken.rain.safetensors", fit="streams").calibrate()


def test_pages_are_touched_whatever_the_type() -> None:
    for tensor in (torch.ones(3, 5000), torch.ones(()), torch.empty(0), torch.ones(2, 3).mT):
        touch(tensor)
