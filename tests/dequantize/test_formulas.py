"""The formulas against transformers' own, and against float64 number by number."""

from __future__ import annotations

import pytest
import torch
from quantised import FP4, fp8_blocks, integers
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from rain_mergekit.dequantize import formulas
from rain_mergekit.dequantize.formulas import fp8, mxfp4, packed_integers


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def all_codes() -> Tensor:
    """Every number of FP8 but NaN, [254, 1]."""
    codes = torch.arange(256, dtype=torch.uint8)  # torch 2.6 cannot index the numbers themselves
    finite = codes.view(torch.float8_e4m3fn).float().isfinite()
    return codes[finite][:, None].view(torch.float8_e4m3fn)


def test_full_blocks_as_transformers() -> None:
    parts = fp8_blocks("w", random(64, 96), (32, 48))
    given = {"weight": [parts["w"]], "weight_scale_inv": [parts["w_scale_inv"]]}
    (theirs,) = Fp8Dequantize(None).convert(given).values()
    theirs = theirs[0] if isinstance(theirs, list) else theirs
    ours = fp8(parts["w"], parts["w_scale_inv"], (32, 48))
    assert torch.equal(ours, theirs.to(torch.bfloat16))


def test_blocks_at_the_edges() -> None:
    """A power of two as scale makes every product exact, so float64 must give the same bits."""
    weight, block = random(70, 50), (32, 24)
    codes = fp8_blocks("w", weight, block)["w"]
    scale = torch.exp2(torch.arange(9.0) - 4).reshape(3, 3)
    expected = torch.empty(70, 50, dtype=torch.float64)
    for row in range(70):
        for column in range(50):
            factor = scale[row // block[0], column // block[1]].double()
            expected[row, column] = codes[row, column].double() * factor
    assert torch.equal(fp8(codes, scale, block).double(), expected)


def test_experts_together_are_the_experts_alone() -> None:
    one, two = (fp8_blocks("w", random(40, 50, seed=seed), (32, 32)) for seed in (1, 2))
    both = {name: torch.stack([one[name], two[name]]) for name in one}
    found = fp8(both["w"], both["w_scale_inv"], (32, 32))
    assert torch.equal(found[1], fp8(two["w"], two["w_scale_inv"], (32, 32)))


@pytest.mark.parametrize("shape", [(254, 1), (1,), ()])
def test_every_fp8_number_with_a_scale_a_row_or_one(shape: tuple[int, ...]) -> None:
    codes, scale = all_codes(), random(254).abs()[: max(1, *shape, 1)].reshape(shape)
    expected = codes.double() * scale.double()
    found = fp8(codes, scale, None).double()
    assert (found - expected).abs().le(expected.abs() * 2**-8).all()  # bfloat16 has 8 bits


def test_every_mxfp4_number_at_every_scale() -> None:
    """All 256 bytes at all scales at which no number overflows, as transformers does it."""
    scales = torch.arange(252, dtype=torch.uint8).reshape(1, 252, 1).expand(1, 252, 16)
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 252, 16, 16)
    ours = mxfp4(blocks[0], scales[0])
    theirs = convert_moe_packed_tensors(blocks, scales)[0]
    assert ours.shape == (512, 252)
    assert torch.equal(ours, theirs)
    for scale, byte in ((0, 0x21), (127, 0xF7), (251, 0x9A)):
        pair = ours[2 * byte : 2 * byte + 2, scale].double()
        factor = 2.0 ** (scale - 127)
        assert pair.tolist() == [
            float(FP4[byte & 15].double() * factor),
            float(FP4[byte >> 4].double() * factor),
        ]


def test_scale_255_is_no_number() -> None:
    blocks = torch.full((1, 1, 16), 0x11, dtype=torch.uint8)
    assert mxfp4(blocks, torch.tensor([[255]], dtype=torch.uint8)).isnan().all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_packed_integers(
    bits: int, zero_points: bool, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In groups that the columns do not fill, or whose columns lie anywhere."""
    monkeypatch.setattr(formulas, "_STRIP", 4)  # several, and the last one is not full
    rows, columns, group = 11, 45, 16
    order = (torch.arange(columns) * 7) % 3 if mixed else None
    weight = random(rows, columns) + 0.3
    parts = integers(bits, group, zero_points=zero_points, order=order)("w", weight)
    words, scale = parts["w_packed"], parts["w_scale"]
    each = 32 // bits
    expected = torch.empty(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            code = (int(words[row, column // each]) >> bits * (column % each)) % 2**bits
            of = column // group if order is None else int(order[column])
            zero = 2 ** (bits - 1)
            if zero_points:
                zero = int(parts["w_zero_point"][row // each, of]) >> bits * (row % each)
            expected[row, column] = (code - zero % 2**bits) * float(scale[row, of])
    more = [parts[name] for name in ("w_zero_point", "w_g_idx") if name in parts]
    found = packed_integers(
        words,
        scale,
        *more,
        shape=(rows, columns),
        bits=bits,
        group=group,
        zero_points=zero_points,
    )
    assert torch.equal(found, expected.to(torch.bfloat16))
    of_column = order if mixed else torch.arange(columns) // group
    near = 2 * scale[:, of_column].double() + weight.double().abs() * 2**-8
    assert ((found.double() - weight).abs() <= near).all()


def test_packed_integers_with_one_scale() -> None:
    weight = random(5, 20)
    words = integers(4, 20)("w", weight)["w_packed"]
    how = {"shape": (5, 20), "bits": 4, "group": 20, "zero_points": False}
    for scale in (torch.tensor([0.5]), torch.tensor(0.5)):
        each = packed_integers(words, torch.full((5, 1), 0.5), **how)
        assert torch.equal(packed_integers(words, scale, **how), each)
        assert each.abs().max() == 0.5 * 7
