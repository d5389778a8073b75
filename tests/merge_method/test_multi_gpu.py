"""What `--multi-gpu` asks of the method: one thread a device, and that device the default one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor, TaskUniverse
from mergekit.io.tasks import SaveTensor
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from merging import LAYERS, Trio, config, make_calibration, merge
from torch import Tensor
from transformers import AutoConfig

THREADS = 4
ELSEWHERE = torch.device("meta")  # a device that keeps no numbers, in the place of a second GPU


def test_threads_with_another_default_device_give_what_one_gives(tmp_path: Path) -> None:
    """mergekit's own plan and executors, as its multi-GPU executor starts them in its threads."""
    trio = Trio.make(tmp_path / "models")
    content = config(trio, make_calibration(trio).write(tmp_path / "c.safetensors"))
    serial = merge(tmp_path / "serial", content).weights()
    parsed, options = MergeConfiguration.model_validate(content), MergeOptions()
    planner = MergePlanner(
        parsed,
        get_architecture_info(parsed, options),
        options,
        AutoConfig.from_pretrained(trio.reasoning),
    )
    planned = planner.plan_to_disk(str(tmp_path / "nowhere"))
    merges = {
        task.tensor_name: task.tensor_task for task in planned if isinstance(task, SaveTensor)
    }
    universe = TaskUniverse(list(merges.values()))
    handles = {name: universe.get_handle(task) for name, task in merges.items()}
    start = threading.Barrier(THREADS)

    def work(share: int) -> dict[str, Tensor]:
        names = list(handles)[share::THREADS]
        start.wait()
        with torch.device(ELSEWHERE):
            results = dict(Executor([handles[name] for name in names]).run(quiet=True))
        return {name: results[merges[name]] for name in names}

    with ThreadPoolExecutor(THREADS) as pool:
        found = {name: t for part in pool.map(work, range(THREADS)) for name, t in part.items()}
    assert len(found) > 7 * LAYERS
    assert found.keys() == serial.keys()
    for name, tensor in serial.items():
        assert torch.equal(found[name], tensor), name
