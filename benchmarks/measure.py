"""One measurement in a process of its own: `python -m benchmarks.measure WHAT JSON`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers.models.qwen2.modeling_qwen2  # noqa: F401 - imported before memory counts
from transformers import AutoModelForCausalLM

from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import calibrate, plan
from rain_mergekit.calibration.samples import load_samples
from rain_mergekit.config.merge_config import read_config
from rain_mergekit.models.loading import LoadOptions, open_trio
from rain_mergekit.system import blas_mode
from rain_mergekit.system.speed import measure_rates

REPOSITORY = Path(__file__).parents[1]


def in_child(what: str, **options: Any) -> dict[str, Any]:
    """Run one of TASKS in a fresh process and return what it printed."""
    command = [sys.executable, "-m", "benchmarks.measure", what, json.dumps(options, default=str)]
    # As the command sets it before anything imports torch, which this module does.
    strict = {blas_mode.MKL: blas_mode.STRICT} if options.get("deterministic") else {}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
        env={**os.environ, **strict},
    )
    if done.returncode != 0:
        raise RuntimeError(f"{what}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def status(field: str) -> int:
    """A field of this process's memory accounting, in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    return 0 if found is None else int(found[1]) * 1024


@contextmanager
def peak_memory(result: dict[str, Any]) -> Iterator[None]:
    """Adds peak_bytes: the highest resident set inside, above what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = status("VmRSS")
    try:
        yield
    finally:
        result["peak_bytes"] = status("VmHWM") - before


def calibration(options: dict[str, Any]) -> dict[str, Any]:
    """One calibration: seconds, peak memory above the imports, passes, and the plan's numbers.

    With `rates`, on a CPU, the plan's seconds too, by rates in processor time before and after.
    """
    config = read_config(options["config"])
    device = options.get("device", "cpu")
    run = RunOptions(
        activation_budget=int(options["budget"]),
        device=device,
        keep_on_device=True,
        deterministic=options.get("deterministic", False),
        quiet=True,
    )
    planned = plan(config, run)

    def planned_seconds() -> list[float]:
        if not options.get("rates", False):
            return []
        here = config.calibration.parent
        rates = measure_rates(device, torch.float32, here, time.process_time)
        return [planned.operations.computing(rates)]

    before = planned_seconds()
    result: dict[str, Any] = {}
    start, used = time.perf_counter(), time.process_time()
    with peak_memory(result):
        summary = calibrate(config, run)
    if run.device != "cpu":
        result["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
    seconds, processor = time.perf_counter() - start, time.process_time() - used
    instruction = summary.samples.instruction
    sizes = {"reasoning": len(summary.samples.reasoning.samples)}
    sizes["instruction"] = 0 if instruction is None else len(instruction.samples)
    passes = {name: count / summary.layers for name, count in summary.layer_passes.items()}
    return {
        **result,
        "seconds": seconds,
        "processor_seconds": processor,
        "passes_each": {
            name: passes[name] / size for name, size in sizes.items() if name in passes
        },
        "layers": summary.layers,
        "bytes": summary.bytes,
        "planned_processor_seconds": before + planned_seconds(),
        "planned_peak": planned.peak,
        "planned_layer": planned.memory.get("layer", 0),
        "planned_bytes": planned.file_bytes,
        "forward_flops": planned.forward_flops,
        "statistics_flops": planned.statistics_flops,
        "read_bytes": planned.read_bytes,
    }


def forward(options: dict[str, Any]) -> dict[str, Any]:
    """Plain transformers: load the reasoning model, run every sample as often as calibrate does.

    Tokens are made before the clock runs, and the model's classes are imported, as they are for
    `calibration` by its plan.
    """
    config = read_config(options["config"])
    trio = open_trio(config, LoadOptions())
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(trio.config)
    samples = load_samples(config.settings, trio)
    sets = [samples.reasoning.samples, samples.instruction.samples if samples.instruction else ()]
    device = options.get("device", "cpu")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    start, used = time.perf_counter(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(trio.reasoning.path, dtype=dtype).to(device)
    loaded, used_loading = time.perf_counter(), time.process_time()
    with torch.no_grad():
        for sample in (item for members in sets for item in members):
            ids = torch.tensor([sample.input_ids], device=device)
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    if device != "cpu":
        torch.cuda.synchronize()
    end = time.perf_counter()
    return {
        "seconds": end - start,
        "processor_seconds": time.process_time() - used,
        "forward_seconds": end - loaded,
        "forward_processor_seconds": time.process_time() - used_loading,
    }


def rates(options: dict[str, Any]) -> dict[str, Any]:
    """What this machine can do: matrix products, copies in memory, reads and writes of the disk."""
    left, right = torch.randn(1024, 4096), torch.randn(4096, 1024)
    flops = 2 * 1024 * 1024 * 4096 / best(lambda: left @ right)
    wide = left.double(), right.double()
    double = 2 * 1024 * 1024 * 4096 / best(lambda: wide[0] @ wide[1])
    source = torch.randn(16 * 1024**2)
    target = torch.empty_like(source)
    memory = 2 * source.nbytes / best(lambda: target.copy_(source))
    found = {"float32_flops": flops, "float64_flops": double, "memory_bytes": memory}
    found |= disk(Path(options["folder"]) / "disk")
    return found | gpu_rates() if torch.cuda.is_available() else found


def disk(path: Path, size: int = 256 * 1024**2) -> dict[str, float]:
    """Bytes per second, past the page cache in both directions."""
    content = os.urandom(16 * 1024**2)

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for _ in range(size // len(content)):
                file.write(content)
            os.fsync(file.fileno())

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.readinto(buffer):
                pass

    buffer = bytearray(len(content))
    written = size / best(write, 3)
    found = {"disk_write_bytes": written, "disk_read_bytes": size / best(read, 3)}
    path.unlink()
    return found


def gpu_rates() -> dict[str, float]:
    """Products in bfloat16, and copies in the GPU's memory."""
    left = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(left)

    def product() -> None:
        torch.mm(left, left, out=target)
        torch.cuda.synchronize()

    def copy() -> None:
        target.copy_(left)
        torch.cuda.synchronize()

    flops = 2 * 4096**3 / best(product)
    return {"gpu_bfloat16_flops": flops, "gpu_memory_bytes": 2 * left.nbytes / best(copy)}


def best(work: Callable[[], Any], repeats: int = 7) -> float:
    """Shortest time of several: what the machine can do when nothing disturbs it."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


TASKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "calibration": calibration,
    "forward": forward,
    "rates": rates,
}

if __name__ == "__main__":
    print(json.dumps(TASKS[sys.argv[1]](json.loads(sys.argv[2]))))
