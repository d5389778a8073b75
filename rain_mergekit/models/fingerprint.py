"""Fingerprints of checkpoints: whether two folders hold the same model."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from mergekit.common import ModelReference
from torch import Tensor

from rain_mergekit.models.checkpoint import open_index, open_shard
from rain_mergekit.models.config_file import read_config_file
from rain_mergekit.models.source import published_folder

# Fields of config.json that change without the model changing.
_VOLATILE = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "_commit_hash")
_SAMPLED_TENSORS = 2048


def fingerprint(path: str) -> dict[str, str]:
    """Digests that tie a calibration to a model: config, tensor index, and sampled weights.

    Cheap at any size: one row out of the middle of each tensor (of evenly chosen ones past 2,048)
    is hashed, so that further training changes the fingerprint.
    """
    path = published_folder(path)
    index = open_index(path, ModelReference.model_validate({"model": {"path": path}}))
    listing, weights = hashlib.sha256(), hashlib.sha256()
    names = sorted(index.tensor_paths)
    sampled = set(names[:: max(1, -(-len(names) // _SAMPLED_TENSORS))])
    by_shard: dict[str, list[str]] = {}
    for name in names:
        by_shard.setdefault(index.tensor_paths[name], []).append(name)
    entries: dict[str, str] = {}
    rows: dict[str, bytes] = {}
    for shard, members in by_shard.items():
        with open_shard(path, shard) as file:
            for name in members:
                view = file.get_slice(name)
                entries[name] = f"{name} {view.get_dtype()} {view.get_shape()}\n"
                if name in sampled:
                    rows[name] = _middle_row(file, name, view.get_shape())
    for name in names:
        listing.update(entries[name].encode())
        weights.update(rows.get(name, b""))
    return {
        "config": _config_digest(path),
        "index": listing.hexdigest(),
        "weights": weights.hexdigest(),
    }


def _middle_row(file: Any, name: str, shape: list[int]) -> bytes:
    tensor: Tensor
    if not shape or shape[0] == 0:
        tensor = file.get_tensor(name)
    else:
        middle = shape[0] // 2
        tensor = file.get_slice(name)[middle : middle + 1]
    flat = tensor.contiguous().flatten()[:4096]
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def _config_digest(path: str) -> str:
    config = read_config_file(path)
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
