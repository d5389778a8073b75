"""bitsandbytes, 4 and 8 bits: the formulas number by number, whole commands, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from commands import Workplace, refused, run, succeed
from quantised import Maker, bitsandbytes, eight_bits, four_bits, quantise
from safetensors.torch import load_file
from torch import Tensor

from rain_mergekit.dequantize import formulas
from rain_mergekit.dequantize.quant_state import read_state

WEIGHT = "model.layers.0.mlp.up_proj.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"
KINDS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def single(value: float) -> float:
    """To the next number of float32, as each step of bitsandbytes has it; then float64 again."""
    return float(torch.tensor(value, dtype=torch.float64).float())


@pytest.mark.parametrize(("kind", "nested"), KINDS)
@pytest.mark.parametrize("shape", [(12, 64), (33, 65), (7, 5)])
def test_four_bits_number_by_number(
    kind: str, nested: bool, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, each product rounded once; blocks go across rows, the last may not be full."""
    monkeypatch.setattr(formulas, "_STRIP", 3)
    parts = four_bits(kind, nested=nested)("w", weight := random(*shape))
    state = read_state(parts[f"w.quant_state.bitsandbytes__{kind}"])
    assert (state.shape, state.block) == (shape, 64)
    stored, numbers = parts["w"].flatten().tolist(), parts["w.quant_map"].tolist()
    expected = torch.empty(shape, dtype=torch.float64)
    for index in range(expected.numel()):
        byte = stored[index // 2]
        code = byte // 16 if index % 2 == 0 else byte % 16
        scale = parts["w.absmax"][index // 64].item()
        if nested:
            of_scale = parts["w.nested_quant_map"].tolist()[int(scale)]
            most = parts["w.nested_absmax"][index // 64 // 256].item()
            scale = single(single(of_scale * most) + state.offset)
        expected.view(-1)[index] = single(numbers[code] * scale)
    found = formulas.four_bits(
        *(parts[name] for name in ("w", *(f"w.{part}" for part in state.parts))),
        shape=shape,
        block=state.block,
        nested_block=state.nested_block,
        offset=state.offset,
    )
    assert torch.equal(found, expected.float().to(torch.bfloat16))
    assert 0 < (found.double() - weight).norm() / weight.norm() < 0.2


def test_eight_bits_number_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formulas, "_STRIP", 4)
    parts = eight_bits("w.weight", weight := random(11, 45))
    codes, most = parts["w.weight"], parts["w.SCB"].tolist()
    expected = torch.empty(11, 45, dtype=torch.float64)
    for row in range(11):
        for column in range(45):
            expected[row, column] = int(codes[row, column]) * most[row] / 127
    found = formulas.eight_bits(codes, parts["w.SCB"]).double()
    assert (found - expected).abs().le(expected.abs() * 2**-8).all()  # bfloat16 has 8 bits
    assert 0 < (found - weight).norm() / weight.norm() < 0.02


def test_a_merge_is_that_of_plain_copies(place: Workplace) -> None:
    """Every bit; the roles have 4 bits, 4 bits stored as bfloat16 with nested scales, 8 bits."""
    made: dict[str, tuple[int, Maker]] = {
        "reasoning": (4, four_bits("nf4")),
        "instruct": (4, four_bits("fp4", nested=True, stored=torch.bfloat16)),
        "pretrained": (8, eight_bits),
    }
    text = place.yaml.read_text().replace(str(place.calibration), f"{place.calibration}-2")
    for role, (bits, make) in made.items():
        before = quantise(place.model(role), bitsandbytes(bits), make)
        plain = place.folder / f"{role}-bf16"
        assert f"from bitsandbytes with {bits} bits" in succeed(
            "dequantize", place.model(role), plain
        )
        weights = load_file(plain / "model.safetensors")
        assert {n: t.shape for n, t in weights.items()} == {n: t.shape for n, t in before.items()}
        text = text.replace(f"{place.model(role)}\n", f"{plain}\n")
    copies = place.folder / "copies.yml"
    copies.write_text(text)
    succeed("merge", copies, place.folder / "expected")
    succeed("merge", place.yaml, place.folder / "merged")
    expected, found = (
        load_file(place.folder / name / "model.safetensors") for name in ("expected", "merged")
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    sets = ("--reasoning-data", place.folder / "reasoning.jsonl", "--json")
    views = [
        json.loads(run("verify", place.folder / name, *sets).stdout)
        for name in ("expected", "merged")
    ]
    assert views[0] == views[1]
    assert views[0]["verdict"] == "kept"
    told = run("diff", place.model("reasoning"), place.folder / "reasoning-bf16").output
    assert "0 changed" in told


def test_first_models_name_no_method(place: Workplace) -> None:
    quantise(place.model("instruct"), {"load_in_8bit": True}, eight_bits)
    plain = place.folder / "plain"
    assert "7 tensors from bitsandbytes" in succeed("dequantize", place.model("instruct"), plain)


def test_transposed_weights_are_refused(place: Workplace) -> None:
    quantise(place.model("instruct"), bitsandbytes(8), eight_bits)
    place.change_json("instruct", "config.json", model_type="gpt2")
    out = place.folder / "plain"
    assert "which is not read here" in refused(
        place.folder, "dequantize", place.model("instruct"), out
    )


def state_of(**changes: object) -> Tensor:
    fields = {"quant_type": "nf4", "blocksize": 64, "shape": [144, 64]}
    return torch.tensor(list(json.dumps(fields | changes).encode()), dtype=torch.uint8)


# What is broken -> how, and what the refusal says.
def without_state(weights: dict[str, Tensor]) -> str:
    del weights[STATE]
    return f"{WEIGHT} is stored as U8"


def no_json(weights: dict[str, Tensor]) -> str:
    weights[STATE] = torch.tensor([91, 49, 44], dtype=torch.uint8)
    return f"{STATE} is not a JSON object"


def a_long_state(weights: dict[str, Tensor]) -> str:
    weights[STATE] = torch.zeros(5000, dtype=torch.uint8)
    return f"{STATE} has 5000 bytes, expected at most 4096"


def another_shape(weights: dict[str, Tensor]) -> str:
    weights[STATE] = state_of(shape=[7, 9])
    return "which does not hold [7, 9] numbers of 4 bits"


def experts_together(weights: dict[str, Tensor]) -> str:
    weights[STATE] = state_of(shape=[2, 7, 9])
    return f"{STATE} says shape [2, 7, 9], expected rows and columns"


def no_block(weights: dict[str, Tensor]) -> str:
    weights[STATE] = state_of(blocksize=0)
    return f"{STATE} says blocksize 0, expected whole numbers above 0"


def an_odd_block(weights: dict[str, Tensor]) -> str:
    weights[STATE] = state_of(blocksize=63)
    return "says blocksize 63, expected an even number"


def a_huge_block(weights: dict[str, Tensor]) -> str:
    weights[STATE] = state_of(blocksize=2**40)
    return f"says blocksize {2**40}, expected at most 4096"


def nested_without_its_type(weights: dict[str, Tensor]) -> str:
    weights[STATE] = state_of(nested_blocksize=256, nested_dtype="float16", nested_offset=0.1)
    return "says nested_dtype 'float16' and nested_offset 0.1, expected float32 and a number"


def fewer_scales(weights: dict[str, Tensor]) -> str:
    weights[f"{WEIGHT}.absmax"] = weights[f"{WEIGHT}.absmax"][1:].clone()
    return f"{WEIGHT}.absmax is ["


def no_numbers(weights: dict[str, Tensor]) -> str:
    del weights[f"{WEIGHT}.quant_map"]
    return f"{WEIGHT}.quant_map is missing"


def a_scale_too_many(weights: dict[str, Tensor]) -> str:
    weights["model.norm.weight.absmax"] = torch.ones(4)
    return "model.norm.weight.absmax belongs to no quantised weight"


@pytest.mark.parametrize(
    "change",
    [
        *(without_state, no_json, a_long_state, another_shape, experts_together, no_block),
        *(an_odd_block, a_huge_block, nested_without_its_type, fewer_scales, no_numbers),
        a_scale_too_many,
    ],
)
def test_broken_four_bits(place: Workplace, change: Callable[[dict[str, Tensor]], str]) -> None:
    quantise(place.model("reasoning"), bitsandbytes(4), four_bits())
    expected: list[str] = []
    place.change_weights("reasoning", lambda weights: expected.append(change(weights)))
    out = place.folder / "plain"
    assert expected[0] in refused(place.folder, "dequantize", place.model("reasoning"), out)


def test_broken_eight_bits(place: Workplace) -> None:
    quantise(place.model("reasoning"), bitsandbytes(8), eight_bits)
    stem, out = WEIGHT.removesuffix("weight"), place.folder / "plain"

    def said() -> str:
        return refused(place.folder, "dequantize", place.model("reasoning"), out)

    scale = load_file(place.model("reasoning") / "model.safetensors")[f"{stem}SCB"]
    place.change_weights("reasoning", lambda w: w.update({f"{stem}weight_format": scale[:1] + 1}))
    assert f"{stem}weight_format is not 0" in said()
    place.change_weights("reasoning", lambda w: w.update({f"{stem}SCB": scale[1:].clone()}))
    assert f"{stem}SCB is [{len(scale) - 1}], expected [{len(scale)}]" in said()
    place.change_weights("reasoning", lambda w: w.__delitem__(f"{stem}SCB"))
    assert f"{stem}SCB is missing" in said()
