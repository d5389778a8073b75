"""The changes of stream matching as a LoRA adapter that PEFT reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.schema import TensorPlan
from rain_mergekit.errors import RainError

_PREFIX = "base_model.model"


def write_adapter(
    file: CalibrationFile, folder: Path, strength: float, dtype: torch.dtype
) -> dict[str, int]:
    """Write adapter_config.json and adapter_model.safetensors into `folder`.

    On the reasoning model the adapter gives W + λ A Bᵀ, what the merge writes, but without its
    rounding. Returns the rank of each module.

    Args:
        file: a calibration made with fit: streams.
        folder: an existing folder.
        strength: λ.
        dtype: of the stored factors.

    Raises:
        RainError: the file holds what no adapter can hold: task vectors to be projected or to
            be started from, changes of single experts, or of a head that is the embedding.
    """
    plans = _plans(file)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, plan in plans.items():
        factors = file.change(plan)
        assert factors is not None  # noqa: S101 - _plans keeps no other
        module = name.removesuffix(".weight")
        a, b = factors[0] * strength, factors[1]
        tensors[f"{_PREFIX}.{module}.lora_A.weight"] = b.mT.to(dtype).contiguous()
        tensors[f"{_PREFIX}.{module}.lora_B.weight"] = a.to(dtype).contiguous()
        ranks[module] = int(a.shape[1])
    config = _config(file, ranks, plans)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )
    return ranks


# One expert's weight in a checkpoint, and the embedding where it is the output head too.
_EXPERT = re.compile(r"\.experts\.\d+\.")
_EMBEDDING = re.compile(r"embed_tokens|embed_in|wte|word_embeddings|tok_embeddings")


def _plans(file: CalibrationFile) -> Mapping[str, TensorPlan]:
    other = [name for name, plan in file.tensors.items() if plan.projected]
    if other or not file.tensors:
        found = f"{other[0]} and {len(other) - 1} more" if other else "it lists no weight"
        raise RainError(
            f"{file.path}: an adapter holds low-rank changes only, and this calibration projects "
            f"the task vector ({found}); calibrate with `fit: streams`, or merge with mergekit-yaml"
        )
    started = [name for name, plan in file.tensors.items() if plan.start]
    if started:
        raise RainError(
            f"{file.path}: an adapter holds low-rank changes only, and this calibration starts "
            f"between both models ({started[0]} and {len(started) - 1} more); calibrate with "
            "`stream_start: 0`, or merge with mergekit-yaml"
        )
    experts = [n for n, plan in file.tensors.items() if plan.ranks or _EXPERT.search(n)]
    if experts:
        raise RainError(
            f"{file.path}: an adapter cannot hold a change of its own for each expert of a mixture "
            f"({experts[0]} and {len(experts) - 1} more weights); merge with mergekit-yaml, or "
            "calibrate with `stream_experts: false`"
        )
    words = [n for n, plan in file.tensors.items() if plan.tokens and _EMBEDDING.search(n)]
    if words:
        raise RainError(
            f"{file.path}: an adapter cannot change an output head that is the embedding "
            f"({words[0]}); merge with mergekit-yaml, or calibrate with `lm_head: off`"
        )
    return file.tensors


def _config(
    file: CalibrationFile, ranks: Mapping[str, int], plans: Mapping[str, TensorPlan]
) -> dict[str, Any]:
    """PEFT multiplies by alpha / r: with alpha = r for each module it is 1."""
    most = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": file.models["reasoning"].reference,
        "revision": file.models["reasoning"].revision,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": all(plan.input_axis == -2 for plan in plans.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
