"""The formulas of the quantised formats: codes and scales in, bfloat16 out.

FP8, integers and the numbers of bitsandbytes are computed in float32, in which every product but
those with float32 scales is exact, and rounded to bfloat16 once at the end; some rows at a time, so
that little is in float32. MXFP4 is exact in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The sixteen numbers of FP4 (E2M1) by their code.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E8M0_BIAS, _E8M0_NAN = 127, 255
_STRIP = 1024  # rows, or blocks
_MANTISSA = 23  # bits of float32 below its exponent, which has the same bias
_WORD = 32  # bits
_OF_127 = 7.874015718698502e-3  # by which bitsandbytes multiplies where it means a division


def fp8(codes: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """FP8 times its scale.

    Args:
        codes: [..., rows, columns], float8_e4m3fn.
        scale: with `block` [..., rows / block[0], columns / block[1]], rounded up: blocks at the
            edges may not be full. Without, anything that broadcasts: one number, or one a row.
        block: rows and columns that share a scale.
    """
    factors = scale.to(torch.float32)
    if block is None:
        return codes.to(torch.float32).mul_(factors).to(torch.bfloat16)
    rows, columns = codes.shape[-2:]
    factors = factors.repeat_interleave(block[1], -1)[..., :columns]
    result = torch.empty(codes.shape, dtype=torch.bfloat16, device="cpu")
    for index, start in enumerate(range(0, rows, block[0])):
        strip = codes[..., start : start + block[0], :].to(torch.float32)
        result[..., start : start + block[0], :] = strip * factors[..., index, None, :]
    return result


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """One expert's weight as transformers' plain gpt-oss has it: [columns, rows].

    Args:
        blocks: [rows, columns / 32, 16], uint8; two FP4 numbers a byte, the low half first.
        scales: [rows, columns / 32], uint8; powers of two with the bias 127, 255 is NaN.
    """
    numbers = torch.tensor((*_FP4, *(-value for value in _FP4)), dtype=torch.bfloat16, device="cpu")
    byte = torch.arange(256)
    pairs = torch.stack((numbers[byte & 15], numbers[byte >> 4]), dim=-1).view(torch.int32)[:, 0]
    factors = (scales.to(torch.int32) << _MANTISSA).view(torch.float32)  # the same exponent
    factors[scales == 0] = 2.0**-_E8M0_BIAS
    factors[scales == _E8M0_NAN] = torch.nan
    values = pairs[blocks.to(torch.int32)].view(torch.bfloat16)  # a pair at a time
    values *= factors.to(torch.bfloat16)[..., None]
    return values.flatten(-2).transpose(-1, -2).contiguous()


def packed_integers(
    codes: Tensor,
    scale: Tensor,
    *more: Tensor,
    shape: tuple[int, int],
    bits: int,
    group: int,
    zero_points: bool,
) -> Tensor:
    """Integers of 4 or 8 bits, minus their zero points, times their scales: [rows, columns].

    Args:
        codes: [rows, columns * bits / 32] rounded up, int32; the lowest bits come first.
        scale: [rows, groups], or one number for all.
        more: with `zero_points` these, [rows * bits / 32 rounded up, groups], int32, packed along
            the rows; then the group of each column, where columns are not grouped in their order.
        shape: rows and columns.
        bits: of each number.
        group: columns of a group.
        zero_points: whether they are given; otherwise all are half of the range.
    """
    rows, columns = shape
    order = more[-1].to(torch.int64) if len(more) > zero_points else None
    scales = scale.to(torch.float32) if scale.dim() == 2 else scale.float().expand(rows, 1)

    def of_columns(by_group: Tensor) -> Tensor:
        if order is not None:
            return by_group[:, order]
        return by_group.repeat_interleave(group, -1)[:, :columns]

    zeros = _unpacked(more[0].T, bits)[:, :rows].T if zero_points else None
    result = torch.empty(shape, dtype=torch.bfloat16, device="cpu")
    for start in range(0, rows, _STRIP):
        strip = slice(start, start + _STRIP)
        values = _unpacked(codes[strip], bits)[:, :columns]
        values -= 1 << (bits - 1) if zeros is None else of_columns(zeros[strip])
        result[strip] = of_columns(scales[strip]).mul_(values)
    return result


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """The unsigned numbers in each row of 32-bit words, as int32."""
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def four_bits(
    codes: Tensor,
    absmax: Tensor,
    numbers: Tensor,
    *nested: Tensor,
    shape: tuple[int, int],
    block: int,
    nested_block: int = 0,
    offset: float = 0.0,
) -> Tensor:
    """NF4 or FP4 of bitsandbytes, one number for each block times one of sixteen: [rows, columns].

    Args:
        codes: of any type and shape; two codes a byte, the high half first, one row behind another.
        absmax: [blocks], float32; with `nested` uint8, of numbers in the second of these.
        numbers: [16], float32, by their code.
        nested: [blocks / nested_block rounded up] and [256], both float32: what `absmax` is times,
            before `offset` is added, and its numbers.
        shape: rows and columns.
        block: numbers that share a scale; even.
        nested_block: scales that share a scale of their own.
        offset: the mean of all scales where they are quantised too.
    """
    scales = absmax
    if nested:
        factors = nested[0].repeat_interleave(nested_block)[: len(absmax)]
        scales = nested[1][absmax.to(torch.int32)].mul_(factors).add_(offset)
    byte = torch.arange(256)
    pairs = torch.stack((numbers[byte >> 4], numbers[byte & 15]), dim=-1)
    packed = codes.contiguous().flatten().view(torch.uint8)
    result = torch.empty(2 * len(packed), dtype=torch.bfloat16, device="cpu")
    for start in range(0, len(scales), _STRIP):
        strip = slice(start * block, (start + _STRIP) * block)
        values = pairs[packed[strip.start // 2 : strip.stop // 2].to(torch.int32)].flatten()
        factors = scales[start : start + _STRIP].repeat_interleave(block)
        result[strip] = values.mul_(factors[: len(values)])
    return result[: shape[0] * shape[1]].view(shape)


def eight_bits(codes: Tensor, scale: Tensor) -> Tensor:
    """INT8 of bitsandbytes, [rows, columns]: the largest number of a row has the code 127.

    Args:
        codes: [rows, columns], int8.
        scale: [rows], float32; the largest number of each row.
    """
    result = torch.empty(codes.shape, dtype=torch.bfloat16, device="cpu")
    for start in range(0, len(codes), _STRIP):
        strip = slice(start, start + _STRIP)
        result[strip] = codes[strip].to(torch.float32).mul_(scale[strip, None]).mul_(_OF_127)
    return result
