"""What stock mergekit will write of a model: asked of its own architecture tables."""

from __future__ import annotations

from typing import Any

from mergekit.architecture import arch_info_for_config

from rain_mergekit.checkpoint import Checkpoint

# Buffers that older checkpoints carry and that every model computes anew.
_DERIVED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


def lost_tensors(checkpoint: Checkpoint, config: Any) -> tuple[str, ...]:
    """Tensors of the checkpoint that a merge leaves out, under whatever merge method.

    mergekit writes what its architecture file lists; e.g. it lists no attention biases for Llama.
    Architectures without such a file are inferred from the model and lose nothing.
    """
    architecture = arch_info_for_config(config)
    if architecture is None:
        return ()
    listed: set[str] = set()
    for weight in architecture.all_weights(config):
        listed.update((weight.name, *(weight.aliases or ()), *(weight.tied_names or ())))
    lost = (name for name in checkpoint.names - listed if not name.endswith(_DERIVED))
    return tuple(sorted(lost))


def lost_warning(lost: tuple[str, ...]) -> str:
    """One sentence for the user."""
    shown = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
    return (
        f"mergekit's architecture file does not list {len(lost)} tensors of the reasoning model "
        f"({shown}); a merged model will lack them, under every merge method: copy them from the "
        "reasoning model, or use a mergekit that lists them"
    )
