"""One calibration of a device run, or a pass over its weights; its argument is JSON."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import calibrate, plan
from rain_mergekit.capture.layers_ahead import ReaderThread
from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.config.merge_config import read_config
from rain_mergekit.models.loading import LoadOptions, default_dtype, open_model, read_model_config
from rain_mergekit.system.profile import LOAD, Profile, profiling
from rain_mergekit.system.speed import measure_rates


def reading(options: dict[str, Any]) -> dict[str, Any]:
    """Bytes of all layers of both models, and the seconds in which the loader read them."""
    config, device, load = read_config(options["config"]), options["device"], LoadOptions()
    profile = Profile(torch.cuda.synchronize if device != "cpu" else lambda: None)
    with profiling(profile), ReaderThread(options["loader"]) as thread:
        for reference in (config.reasoning, config.instruct):
            checkpoint = open_model(reference, load)
            settings = read_model_config(checkpoint)
            dtype = default_dtype(settings, device)
            model = LayerwiseModel.open(checkpoint, settings, dtype, device)
            indices = range(len(model.layers))
            with model.reading_ahead(indices, thread):
                for index in indices:
                    with model.layer(index):
                        pass
    return {"bytes": profile.bytes[LOAD], "seconds": profile.seconds(main=False)[LOAD]}


def measured(options: dict[str, Any]) -> dict[str, Any]:
    """Seconds by phase, memory, what was read, and what the plan says beside it."""
    config, device = read_config(options["config"]), options["device"]
    run = RunOptions(
        device=device,
        activation_budget=options["budget"],
        keep_on_device=True,
        loader=options["loader"],
        experts_budget=options["experts_budget"],
        quiet=True,
    )
    dtype = default_dtype(read_model_config(open_model(config.reasoning, run.load)), device)
    planned, rates = plan(config, run), measure_rates(device, dtype, Path(options["folder"]))
    gpu = device != "cpu"
    profile = Profile(torch.cuda.synchronize if gpu else lambda: None)
    start = time.monotonic()
    with profiling(profile):
        summary = calibrate(config, run)
    seconds, phases = time.monotonic() - start, profile.seconds()
    reading = profile.seconds(main=False).get(LOAD, 0.0) or phases.get(LOAD, 0.0)
    profile.write(Path(options["trace"]))
    return {
        "seconds": seconds,
        "first_layer": summary.first_layer,
        "phases": phases,
        "read_bytes": profile.bytes[LOAD],
        "read_seconds": reading,
        "file_bytes": summary.bytes,
        "gpu_peak": torch.cuda.max_memory_allocated() if gpu else None,
        "host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "planned_seconds": planned.operations.total(rates),
        "planned_peak": planned.peak,
        "tokens": sum(len(one.input_ids) for one in summary.samples.reasoning.samples),
    }


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps({"calibrate": measured, "read": reading}[asked["what"]](asked)))
