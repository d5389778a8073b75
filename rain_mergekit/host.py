"""What stock mergekit will write of a model, and what not."""

from __future__ import annotations

from collections.abc import Sequence

from rain_mergekit.names import Names
from rain_mergekit.tensors import ModelTensors

# Buffers that older checkpoints carry and that every model computes anew.
_DERIVED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias", "attention.bias")


def left_out(tensors: ModelTensors, names: Names) -> dict[str, tuple[str, ...]]:
    """Tensors of the model that a merge leaves out, under whatever merge method.

    With each, what the checkpoint calls it or its parts. mergekit writes what its architecture
    file lists; e.g. it lists no attention biases for Llama.
    """
    return {
        name: tuple(part for part, _ in source.parts)
        for name, source in sorted(tensors.sources.items())
        if not names(name) and not name.endswith(_DERIVED)
    }


def lost_tensors(tensors: ModelTensors, names: Names) -> tuple[str, ...]:
    """The checkpoint's names of all that a merge leaves out."""
    return tuple(sorted(part for parts in left_out(tensors, names).values() for part in parts))


def lost_warning(lost: Sequence[str]) -> str:
    """One sentence for the user."""
    shown = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
    return (
        f"mergekit leaves out {len(lost)} tensors of the reasoning model "
        f"({shown}) under every merge method: `mergekit-rain merge` adds them afterwards; a model "
        "merged with mergekit-yaml will lack them"
    )
