"""How far two models' distributions of the next token are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.capture.output_head import finishing

# One float32 copy of the logits of a chunk holds at most this many numbers (128 MiB).
CHUNK_LOGITS = 2**25


@contextmanager
def diverging(
    reference: LayerwiseModel, model: LayerwiseModel
) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """A function from both models' rows (n, d) after their last layers to divergences (n) float64.

    KL(reference || model) of the next token, in nats, over the tokens that both models have.
    Logits of many rows never exist together.
    """
    tokens = common_tokens(reference.model, model.model)
    chunk = max(16, CHUNK_LOGITS // tokens)
    with finishing(reference) as wanted, finishing(model) as found:

        def divergence(own: Tensor, other: Tensor) -> Tensor:
            blocks = (torch.split(rows, chunk) for rows in (own, other))
            parts = [
                kl_divergence(wanted(left)[:, :tokens], found(right)[:, :tokens])
                for left, right in zip(*blocks, strict=True)
            ]
            return torch.cat(parts).double().cpu()

        yield divergence


def kl_divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL(p || q) over the last axis of two tensors of logits (..., vocabulary).

    In float32, or wider where the logits are.
    """
    dtype = torch.promote_types(wanted.dtype, torch.float32)
    log_p = wanted.to(dtype).log_softmax(-1)
    log_q = found.to(log_p.device, dtype).log_softmax(-1)
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p))
    return terms.sum(-1)


def common_tokens(*models: Any) -> int:
    """How many tokens all of the models have logits for, counted from the first."""
    return min(int(m.get_output_embeddings().weight.shape[0]) for m in models)
