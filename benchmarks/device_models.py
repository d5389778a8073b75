"""Random models of published shapes, written as their publishers write them, for a device run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from benchmarks.device_shapes import DeviceShape, Stored
from benchmarks.shapes import TOKENIZER, TOKENIZER_FILES
from rain_mergekit.system.atomic_file import replacing

_SCALE, _NOISE = 0.02, 0.1  # the noise is relative
_REST = "rest.safetensors"


def write_model(home: Path, shape: DeviceShape, role: str, device: str) -> int:
    """One checkpoint, a shard for each layer; returns the bytes that were not there yet.

    All layers hold the same random numbers, and are files of their own.
    """
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.json").write_text(json.dumps(shape.fields()))
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, home / name)
    parts: dict[str, list[str]] = {_REST: list(shape.rest_stored())}
    for n in range(shape.layers):
        names = [f"model.layers.{n}.{name}" for name in shape.layer_stored()]
        parts[f"layer-{n:05d}.safetensors"] = names
    places = {name: file for file, names in parts.items() for name in names}
    index = {"metadata": {"total_size": shape.model_bytes}, "weight_map": places}
    (home / "model.safetensors.index.json").write_text(json.dumps(index))
    missing = [file for file in parts if not (home / file).exists()]
    layer = list(_numbers(shape.layer_stored(), shape.block, role, device)) if missing else []
    written = 0
    for file in missing:
        rest = file == _REST
        tensors = list(_numbers(shape.rest_stored(), None, role, device)) if rest else layer
        with replacing(home / file) as out:
            out.write(save(dict(zip(parts[file], tensors, strict=True)), {"format": "pt"}))
        written += sum(tensor.nbytes for tensor in tensors)
    return written


def _numbers(
    stored: Mapping[str, Stored], block: int | None, role: str, device: str
) -> Iterator[Tensor]:
    """Random tensors in the order of `stored`; the instruct model's are near the reasoning model's.

    block: of the FP8 weights, each of which its scales follow; None where there are none.
    """
    base = torch.Generator(device).manual_seed(0)
    other = torch.Generator(device).manual_seed(1)
    for dtype, size in stored.values():
        if dtype == torch.float32:  # scales, which have come with their weight
            continue
        if len(size) == 1:
            yield torch.ones(size, dtype=dtype)
            continue
        value = torch.randn(size, generator=base, device=device)
        if role != "reasoning":
            value += torch.randn(size, generator=other, device=device).mul_(_NOISE)
        value = value.mul_(_SCALE).cpu()
        if block is not None and dtype == torch.float8_e4m3fn:
            yield from _fp8(value, block)
        else:
            yield value.to(dtype)


def _fp8(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """FP8 numbers, and a scale for each block x block of them, so that a block's largest is 448."""
    blocks = weight.unflatten(0, (-1, block)).unflatten(2, (-1, block))
    scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    found = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return found.reshape(weight.shape), scales
