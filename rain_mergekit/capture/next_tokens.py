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
    """
    with _logits(reference, model) as logits:

        def divergence(own: Tensor, other: Tensor) -> Tensor:
            parts = [kl_divergence(*pair) for pair in logits(own, other)]
            return torch.cat(parts).double().cpu()

        yield divergence


@contextmanager
def comparing(
    reference: LayerwiseModel, model: LayerwiseModel
) -> Iterator[Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """A function from both models' rows and the tokens that follow, (n), to two float64 (n).

    The first are the divergences of `diverging`; the second say how much likelier the reference
    finds the token that follows, in nats. Where that is no token of both models, it is 0.
    """
    tokens = common_tokens(reference.model, model.model)
    with _logits(reference, model) as logits:

        def compared(own: Tensor, other: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
            apart, ahead = [], []
            start = 0
            for pair in logits(own, other):
                log_p, log_q = _log_probabilities(*pair)
                apart.append(_divergence(log_p, log_q))
                part = following[start : start + len(log_p)].to(log_p.device)
                start += len(part)
                known = (part >= 0) & (part < tokens)
                place = torch.where(known, part, 0)[:, None]
                more = (log_p.gather(1, place) - log_q.gather(1, place))[:, 0]
                ahead.append(torch.where(known, more, 0.0))
            return torch.cat(apart).double().cpu(), torch.cat(ahead).double().cpu()

        yield compared


@contextmanager
def _logits(
    reference: LayerwiseModel, model: LayerwiseModel
) -> Iterator[Callable[[Tensor, Tensor], Iterator[tuple[Tensor, Tensor]]]]:
    """A function from both models' rows (n, d) to both models' logits, a chunk of rows at a time.

    Logits of many rows never exist together.
    """
    tokens = common_tokens(reference.model, model.model)
    chunk = max(16, CHUNK_LOGITS // tokens)
    with finishing(reference) as wanted, finishing(model) as found:

        def logits(own: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
            blocks = (torch.split(rows, chunk) for rows in (own, other))
            for left, right in zip(*blocks, strict=True):
                yield wanted(left)[:, :tokens], found(right)[:, :tokens]

        yield logits


def kl_divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL(p || q) over the last axis of two tensors of logits (..., vocabulary).

    In float32, or wider where the logits are.
    """
    return _divergence(*_log_probabilities(wanted, found))


def _log_probabilities(wanted: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Of two tensors of logits (..., vocabulary), on one device, in float32 or wider."""
    dtype = torch.promote_types(wanted.dtype, torch.float32)
    log_p = wanted.to(dtype).log_softmax(-1)
    return log_p, found.to(log_p.device, dtype).log_softmax(-1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p))
    return terms.sum(-1)


def common_tokens(*models: Any) -> int:
    """How many tokens all of the models have logits for, counted from the first."""
    return min(int(m.get_output_embeddings().weight.shape[0]) for m in models)
