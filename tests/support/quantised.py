"""Models as they are published quantised, made by the formats' formulas.

Each maker gives the tensors that stand for one weight, under the names that its format has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Maker: TypeAlias = "Callable[[str, Tensor], dict[str, Tensor]]"

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
BLOCK = (32, 40)
LARGEST = 448.0  # of float8_e4m3fn


def fp8_blocks(name: str, weight: Tensor, block: tuple[int, int] = BLOCK) -> dict[str, Tensor]:
    """FP8 with one scale for each block, as DeepSeek publishes it; edge blocks are not full."""
    rows, columns = weight.shape
    scales = torch.empty(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            scales[i, j] = weight[place].float().abs().max() / LARGEST
            codes[place] = (weight[place].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scales}


def fp8_rows(name: str, weight: Tensor) -> dict[str, Tensor]:
    """FP8 with one scale for each row, as compressed-tensors has it, and one of activations."""
    scales = (weight.float().abs().amax(1, keepdim=True) / LARGEST).to(torch.bfloat16)
    codes = (weight.float() / scales.float()).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    stem = name.removesuffix("weight")
    return {name: codes, f"{name}_scale": scales, f"{stem}input_scale": torch.ones(1)}


def packed(numbers: Tensor, bits: int) -> Tensor:
    """Unsigned numbers of each row in 32-bit words, the lowest bits first."""
    each = 32 // bits
    words = torch.zeros(len(numbers), math.ceil(numbers.shape[1] / each), dtype=torch.int64)
    for column in range(numbers.shape[1]):
        words[:, column // each] |= numbers[:, column].long() << (bits * (column % each))
    return words.to(torch.int32)


def integers(
    bits: int, group: int, *, zero_points: bool = False, order: Tensor | None = None
) -> Maker:
    """Packed integers of compressed-tensors, in groups of columns."""

    def make(name: str, weight: Tensor) -> dict[str, Tensor]:
        rows, columns = weight.shape
        of = torch.arange(columns) // group if order is None else order
        scales = torch.empty(rows, int(of.max()) + 1, dtype=torch.bfloat16)
        zeros = torch.full(scales.shape, 1 << (bits - 1))
        codes = torch.empty(rows, columns)
        for index in range(scales.shape[1]):
            part = weight[:, of == index].float()
            low, high = part.amin(1), part.amax(1)
            if zero_points:
                scales[:, index] = ((high - low) / ((1 << bits) - 1)).to(torch.bfloat16)
                zeros[:, index] = (-low / scales[:, index].float()).round().clamp(0, 2**bits - 1)
            else:
                most = torch.maximum(high.abs(), low.abs())
                scales[:, index] = (most / ((1 << (bits - 1)) - 1)).to(torch.bfloat16)
            scaled = part / scales[:, index, None].float() + zeros[:, index, None]
            codes[:, of == index] = scaled.round().clamp(0, (1 << bits) - 1)
        found = {
            f"{name}_packed": packed(codes, bits),
            f"{name}_scale": scales,
            f"{name}_shape": torch.tensor([rows, columns]),
        }
        if zero_points:
            found[f"{name}_zero_point"] = packed(zeros.T, bits).T.contiguous()
        if order is not None:
            found[f"{name}_g_idx"] = order.to(torch.int32)
        return found

    return make


def mxfp4(name: str, weight: Tensor) -> dict[str, Tensor]:
    """MXFP4 as gpt-oss is published; weight: [experts, columns, rows], columns in blocks of 32."""
    blocks = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    most = blocks.abs().amax(-1)
    exponents = torch.floor(torch.log2(most.clamp(min=2.0**-100))) - 2
    scaled = blocks / torch.exp2(exponents)[..., None]
    codes = (scaled[..., None] - FP4).abs().argmin(-1).to(torch.uint8)
    both = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return {f"{name}_blocks": both, f"{name}_scales": (exponents + 127).to(torch.uint8)}


# The sixteen numbers of NF4, from the paper (arXiv 2305.14314), and of FP4 as bitsandbytes has it.
_LOW = [1.0, 0.6961928009986877, 0.5250730514526367, 0.39491748809814453, 0.28444138169288635]
_LOW += [0.18477343022823334, 0.09105003625154495]
_HIGH = [0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
_HIGH += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
_FP4 = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
NUMBERS = {
    "nf4": torch.tensor([*(-one for one in _LOW), *_HIGH]),
    "fp4": torch.tensor([*_FP4, *(-one for one in _FP4)]) / 12,
}


def four_bits(
    kind: str = "nf4", *, nested: bool = False, block: int = 64, stored: torch.dtype = torch.uint8
) -> Maker:
    """NF4 or FP4 as transformers saves it with bitsandbytes; `nested`: the scales in eight bits."""

    def make(name: str, weight: Tensor) -> dict[str, Tensor]:
        flat, numbers = weight.float().flatten(), NUMBERS[kind]
        blocks = math.ceil(len(flat) / block)
        padded = torch.nn.functional.pad(flat, (0, blocks * block - len(flat))).view(blocks, block)
        absmax = padded.abs().amax(1)
        codes = (padded / absmax[:, None])[..., None].sub(numbers).abs().argmin(-1).flatten()
        codes = codes[: len(flat) + len(flat) % 2].to(torch.uint8)
        both = (codes[0::2] << 4) | codes[1::2]
        state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16"}
        state |= {"shape": list(weight.shape)}
        found = {name: both.view(stored)[:, None], f"{name}.quant_map": numbers.clone()}
        if nested:
            offset = absmax.mean()
            found[f"{name}.nested_quant_map"] = of_scales = torch.linspace(-1, 1, 256)
            rest = torch.nn.functional.pad(absmax - offset, (0, -blocks % 256)).view(-1, 256)
            most = rest.abs().amax(1)
            near = (rest / most[:, None])[..., None].sub(of_scales).abs().argmin(-1)
            absmax = near.flatten()[:blocks].to(torch.uint8)
            found[f"{name}.nested_absmax"] = most
            state |= {"nested_blocksize": 256, "nested_dtype": "float32"}
            state |= {"nested_offset": offset.item()}
        packed = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return found | {
            f"{name}.absmax": absmax,
            f"{name}.quant_state.bitsandbytes__{kind}": packed,
        }

    return make


def eight_bits(name: str, weight: Tensor) -> dict[str, Tensor]:
    """INT8 as transformers saves it with bitsandbytes."""
    most = weight.float().abs().amax(1)
    stem = name.removesuffix("weight")
    return {
        name: (weight.float() * (127 / most[:, None])).round().to(torch.int8),
        f"{stem}SCB": most,
        f"{stem}weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def bitsandbytes(bits: int) -> dict[str, Any]:
    """The section of transformers' `BitsAndBytesConfig` in config.json."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": bits == 4,
        "load_in_8bit": bits == 8,
        "llm_int8_skip_modules": None,
    }


FP8_SECTION: Mapping[str, Any] = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}


def compressed(kind: str, **weights: Any) -> dict[str, Any]:
    """The section of compressed-tensors in config.json."""
    scheme = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
    }


def quantise(
    folder: Path, section: Mapping[str, Any], make: Maker, ending: str = "_proj.weight"
) -> dict[str, Tensor]:
    """Quantise the weights with such names in a model's folder; returns what they were before."""
    path, config = folder / "model.safetensors", folder / "config.json"
    before = load_file(path)
    after: dict[str, Tensor] = {}
    for name, tensor in before.items():
        after |= make(name, tensor) if name.endswith(ending) else {name: tensor}
    save_file({name: t.contiguous() for name, t in after.items()}, path, metadata={"format": "pt"})
    fields = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**fields, "quantization_config": section}), encoding="utf-8")
    return before
