"""What stock mergekit will write of a model, and what not."""

from __future__ import annotations

from collections.abc import Sequence

from rain_mergekit.names import Names
from rain_mergekit.tensors import ModelTensors

# Buffers that older checkpoints carry and that every model computes anew.
_DERIVED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias", "attention.bias")


def lost_tensors(tensors: ModelTensors, names: Names) -> tuple[str, ...]:
    """Tensors of the checkpoint that a merge leaves out, under whatever merge method.

    mergekit writes what its architecture file lists; e.g. it lists no attention biases for Llama.
    """
    lost = (
        part
        for name, source in tensors.sources.items()
        if not names(name)
        for part, _ in source.parts
        if not part.endswith(_DERIVED)
    )
    return tuple(sorted(lost))


def lost_warning(lost: Sequence[str]) -> str:
    """One sentence for the user."""
    shown = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
    return (
        f"mergekit leaves out {len(lost)} tensors of the reasoning model "
        f"({shown}); a merged model will lack them, under every merge method: copy them from the "
        "reasoning model, or use a mergekit that lists them"
    )
