"""The names of number types: as torch, other libraries and mergekit spell them, in one spelling."""

from __future__ import annotations

_OTHER = {
    **dict.fromkeys(("bf16",), "bfloat16"),
    **dict.fromkeys(("fp16", "f16", "half"), "float16"),
    **dict.fromkeys(("fp32", "f32", "float", "single"), "float32"),
    **dict.fromkeys(("fp64", "f64", "double"), "float64"),
}


def type_name(name: str) -> str:
    """`bfloat16` for `torch.bfloat16` and `bf16`; an unknown name stays as it is."""
    plain = name.strip().lower().removeprefix("torch.").removeprefix("np.").removeprefix("numpy.")
    return _OTHER.get(plain, plain)
