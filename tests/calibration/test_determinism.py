"""The same inputs give the same file, bit for bit, whatever the run had to do on its way."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_process
from forks import Forks, wait_for_stop
from tiny import INSTRUCTION, REASONING, Tiny
from torch.utils._python_dispatch import TorchDispatchMode

from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import calibrate
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.system.determinism import _Products, deterministic

STRICT = "AUTO,STRICT"
# Three threads on two busy cores: waiting for each other, they must not take the cores.
THREADS = {"MKL_DYNAMIC": "FALSE", "OMP_WAIT_POLICY": "passive"}
ONE_THREAD = "everything runs on one thread, because "
# Of a processor; that nobody has asked for the mode is a fault of the command.
REASONS = (
    f"{ONE_THREAD}MKL's products differ with the number of threads here",
    f"{ONE_THREAD}this torch multiplies without MKL",
)


def promised() -> bool:
    """Whether MKL's maker promises the strict mode for this processor."""
    about = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    intel = "GenuineIntel" in about and ("avx2" in about or "avx512f" in about)
    return intel and torch.backends.mkl.is_available()


def assert_threads(said: str) -> None:
    """Products had all threads where MKL promises their bits; elsewhere perhaps one, and why."""
    found = [reason for reason in REASONS if reason in said]
    assert said.count(ONE_THREAD) == len(found), said
    if promised():
        assert not found


@pytest.fixture(scope="module", name="tiny")
def _tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    tiny = Tiny.make(tmp_path_factory.mktemp("same"), "qwen2")
    return tiny.using(coefficients="normalized", alpha_min=0.0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_budget": 0},
        {"activation_budget": 20_000},
        {"snapshot_seconds": 0},
        {"keep_on_device": True},
    ],
    ids=["again", "all on disk", "some on disk", "snapshots", "kept on the device"],
)
def test_same_bytes(tiny: Tiny, options: dict[str, int]) -> None:
    tiny.calibrate()
    expected = tiny.path.read_bytes()
    calibrate(tiny.config(), RunOptions(quiet=True, **options))  # type: ignore[arg-type]
    assert tiny.path.read_bytes() == expected


def test_threads_change_no_more_than_rounding(tiny: Tiny) -> None:
    """Which is why another number of threads is not promised to give the same bits."""
    projectors = []
    threads = torch.get_num_threads()
    for count in (1, 4):
        torch.set_num_threads(count)
        try:
            tiny.calibrate()
        finally:
            torch.set_num_threads(threads)
        file = CalibrationFile.open(tiny.path)
        factors = [file.factors(site) for site in file.sites]
        projectors.append([f.u @ f.v.mT for f in factors if f.u is not None and f.v is not None])
    for one, other in zip(*projectors, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def long_texts(folder: Path) -> None:
    """Of some hundred tokens: torch gives threads their parts of nothing smaller."""
    reasoning = [
        {"prompt": prompt, "reasoning": " ".join([text] * 12), "response": response}
        for prompt, text, response in REASONING
    ]
    instruction = [
        {**sample, "reason": " ".join([str(sample["reason"])] * 12)} for sample in INSTRUCTION
    ]
    for name, samples in (("reasoning", reasoning), ("instruction", instruction)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))


@pytest.fixture(scope="module", name="wide")
def _wide(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Widths with which threads get parts that end in the middle of a vector instruction."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 192, "intermediate_size": 563, "max_position_embeddings": 4096}
    tiny = Tiny.make(folder, "qwen2", **sizes)
    long_texts(folder)
    return tiny.using(coefficients="normalized", alpha_min=0.0, protect_thinking=1.0)


@pytest.fixture(scope="module", name="forks")
def _forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Processes whose MKL is in its strict mode from the beginning, as `--deterministic` asks."""
    forks = Forks(tmp_path_factory.mktemp("forks"), MKL_CBWR=STRICT, **THREADS)
    yield forks
    forks.close()


@pytest.fixture(autouse=True)
def _nothing_left(wide: Tiny) -> None:
    """Every run of the wide model begins anew."""
    wide.path.unlink(missing_ok=True)
    shutil.rmtree(wide.path.with_name(wide.path.name + ".work"), ignore_errors=True)


def calibrated(wide: Tiny, forks: Forks, threads: int, *options: str) -> bytes:
    """The file of a whole run; what it said is in the log."""
    wide.path.unlink(missing_ok=True)
    arguments = ("calibrate", wide.config().path, "--device", "cpu", *options)
    ended = forks.run(*arguments, threads=threads)
    assert ended.code == 0, ended.output
    assert_threads(ended.output)
    return wide.path.read_bytes()


def merged(wide: Tiny, forks: Forks, threads: int, *options: str) -> tuple[bytes, bytes]:
    """The calibration file and the merged weights of `merge --deterministic`."""
    out = wide.folder / f"merged-{threads}"
    arguments = ("merge", wide.config().path, out, "--deterministic", *options)
    ended = forks.run(*arguments, threads=threads)
    assert ended.code == 0, ended.output
    (weights,) = out.glob("*.safetensors")
    return wide.path.read_bytes(), weights.read_bytes()


@pytest.fixture(scope="module", name="alone")
def _alone(wide: Tiny, forks: Forks) -> tuple[bytes, bytes]:
    """Calibration file and merged weights of one thread."""
    return merged(wide, forks, 1)


def stopped(wide: Tiny, forks: Forks, threads: int) -> None:
    """Killed in the second of two layers, when the first is saved."""
    arguments = ("calibrate", wide.config().path, "--deterministic", "--snapshot-every", "0")
    pid = forks.start(*arguments, threads=threads, stop_at="layer-00001")
    assert wait_for_stop(pid)
    os.kill(pid, signal.SIGKILL)
    assert forks.wait().code == -signal.SIGKILL


def test_any_number_of_threads(wide: Tiny, forks: Forks, alone: tuple[bytes, bytes]) -> None:
    """The calibration file and the merged weights, with hidden states on disk besides."""
    assert merged(wide, forks, 3, "--activation-budget", "0") == alone


@pytest.mark.slow
def test_stock_mergekit_with_mkls_strict_mode(
    wide: Tiny, forks: Forks, alone: tuple[bytes, bytes]
) -> None:
    """It has no such option; the variable in its environment does it."""
    wide.path.write_bytes(alone[0])
    out = wide.folder / "merged-stock"
    ended = forks.run(wide.config().path, out, program="mergekit-yaml", threads=3)
    assert ended.code == 0, ended.output
    (weights,) = out.glob("*.safetensors")
    assert weights.read_bytes() == alone[1]


@pytest.mark.slow
def test_any_number_of_threads_in_bfloat16(wide: Tiny, forks: Forks) -> None:
    options = ("--deterministic", "--dtype", "bfloat16")
    assert calibrated(wide, forks, 1, *options) == calibrated(wide, forks, 3, *options)


@pytest.mark.slow
def test_continued_with_other_threads(wide: Tiny, forks: Forks, alone: tuple[bytes, bytes]) -> None:
    stopped(wide, forks, 2)
    ended = forks.run("calibrate", wide.config().path, "--deterministic", threads=3)
    assert "continued after 1" in ended.output
    assert wide.path.read_bytes() == alone[0]


def test_the_command_alone_asks_for_what_it_needs(wide: Tiny, alone: tuple[bytes, bytes]) -> None:
    """Nobody has set MKL_CBWR, and nothing has loaded torch before."""
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    arguments = ("calibrate", wide.config().path, "--device", "cpu", "--deterministic")
    outcome = run_process(*arguments, env={**environment, **THREADS, "OMP_NUM_THREADS": "3"})
    assert outcome.code == 0, outcome.output
    assert_threads(outcome.output)
    assert wide.path.read_bytes() == alone[0]


def with_threads(wide: Tiny, threads: int, **options: bool) -> bytes:
    """The file of a calibration in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        wide.calibrate(**options)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    return wide.path.read_bytes()


def test_without_it_threads_matter(wide: Tiny) -> None:
    """Else the other tests would show nothing."""
    assert with_threads(wide, 1) != with_threads(wide, 3)


@pytest.mark.parametrize("mode", ["", STRICT], ids=["not asked", "asked too late"])
def test_from_a_program_on_one_thread(
    wide: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: str,
) -> None:
    """In this process torch was loaded, and has multiplied, before anybody set MKL_CBWR."""
    torch.randn(64, 64) @ torch.randn(64, 64)
    monkeypatch.setenv("MKL_CBWR", mode)
    alone = with_threads(wide, 1, deterministic=True)
    assert with_threads(wide, 3, deterministic=True) == alone
    assert CalibrationFile.open(wide.path).header["run"]["deterministic"] is True
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    if not mode:
        assert any("everything runs on one thread" in text for text in warnings)


# Which operations have how many threads; that is the same on every processor.

LARGE, SMALL = (512, 1024, 256), (32, 32, 32)


class Threads(TorchDispatchMode):
    """Writes down how many threads torch has when an operation is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.setdefault(func.overloadpacket.__name__, set()).add(torch.get_num_threads())
        return func(*args, **(kwargs or {}))


def product(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> None:
    rows, inner, columns = shape
    torch.ones(rows, inner, dtype=dtype) @ torch.ones(inner, columns, dtype=dtype)


@pytest.fixture(name="three_threads")
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        (LARGE, torch.float32, 3),
        (LARGE, torch.float64, 3),
        (LARGE, torch.bfloat16, 1),
        (SMALL, torch.float32, 1),
    ],
)
def test_only_large_products_that_mkl_computes_have_all_threads(
    shape: tuple[int, int, int], dtype: torch.dtype, expected: int
) -> None:
    """The fast path, as it is where MKL honours its strict mode."""
    torch.set_num_threads(1)
    with Threads() as threads, _Products(3):
        product(shape, dtype)
        torch.ones(1000).sum()
    assert threads.seen["mm"] == {expected}
    assert threads.seen["sum"] == {1}
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("three_threads")
def test_without_the_strict_mode_all_operations_have_one_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fall-back; afterwards torch has its threads again."""
    monkeypatch.delenv("MKL_CBWR", raising=False)
    with Threads() as threads, deterministic(torch.device("cpu")):
        product(LARGE)
    assert threads.seen.keys() >= {"ones", "mm"}
    assert set.union(*threads.seen.values()) == {1}
    assert torch.get_num_threads() == 3
