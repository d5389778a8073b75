"""The output head (token logits) as one more weight to calibrate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rain_mergekit.calibration.layer import LayerResult
from rain_mergekit.calibration.layer_sites import Collected, LayerSites
from rain_mergekit.calibration.samples import Samples
from rain_mergekit.calibration.task_vectors import TrioTensors
from rain_mergekit.capture.input_sites import LinearWeight, SiteMap
from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.capture.output_head import arriving
from rain_mergekit.capture.streams import Stream
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.errors import RainError
from rain_mergekit.models.empty_model import embedding_weight, output_head
from rain_mergekit.models.loading import Trio
from rain_mergekit.models.model_tensors import ModelTensors
from rain_mergekit.models.tokenizer import has_tokenizer, load_tokenizer
from rain_mergekit.text.token_positions import ReasoningTokens

SITE = "lm_head"


@dataclass(frozen=True)
class HeadWeight:
    """W (vocabulary, width), a row for each token, by its name in the model.

    more: other names of it, under which the checkpoint holds it too. rows: which of its rows are
    merged, (vocabulary) bool.
    """

    name: str
    more: tuple[str, ...]
    shape: tuple[int, int]
    rows: Tensor

    @property
    def sites(self) -> SiteMap:
        """Its one input site."""
        names = (self.name, *self.more)
        weights = {name: LinearWeight(name, self.shape, -1, (SITE,)) for name in names}
        return SiteMap(weights, {SITE: self.shape[1]})

    def task_vector(self, trio: TrioTensors, device: torch.device) -> Iterator[Tensor]:
        """The task vector of the rows that are merged, in blocks (n, width), float32."""
        return trio.of_tokens(self.name, self.rows, device)


def find_head(
    layerwise: LayerwiseModel,
    trio: Trio,
    tensors: TrioTensors,
    samples: Samples,
    settings: RainSettings,
) -> HeadWeight:
    """The head of the models; RainError if it cannot be merged in the way that is asked for."""
    head, _ = output_head(layerwise.model)
    own, embedding = f"{head}.weight", embedding_weight(layerwise.model)
    tied = own in getattr(layerwise.model, "all_tied_weights_keys", ())
    tied = tied or own not in layerwise.tensors.sources
    if tied and settings.lm_head == "all":
        raise RainError(
            f"{trio.reasoning.reference}: its output head and its embedding are one tensor "
            f"({embedding}), which cannot change in one place alone: set lm_head: unseen, or off"
        )
    name = embedding if tied else own
    more = (own,) if tied and own in layerwise.tensors.sources else ()
    shape = _shape(name, layerwise.tensors, tensors)
    return HeadWeight(name, more, shape, _rows(trio, samples, settings, shape[0]))


def _shape(name: str, reasoning: ModelTensors, tensors: TrioTensors) -> tuple[int, int]:
    """The shape of the reasoning model's head; the others may have more or fewer rows."""
    found: dict[str, Tensor] = {}
    models = {"reasoning": reasoning, "instruct": tensors.instruct}
    for role, model in {**models, "pretrained": tensors.pretrained}.items():
        weight = found[role] = model.of_tokens(name)
        who = f"{model.checkpoint.reference} ({role}): {name}"
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise RainError(
                f"{who} is stored as {weight.dtype}, expected a plain weight; set "
                "lm_head: off, or take the model that was not quantised"
            )
        if weight.dim() != 2 or weight.shape[1:] != found["reasoning"].shape[1:]:
            raise RainError(
                f"{who} is {list(weight.shape)}, expected one row for each token as the reasoning "
                f"model's {list(found['reasoning'].shape)}; set lm_head: off"
            )
    rows, width = found["reasoning"].shape
    return int(rows), int(width)


def _rows(trio: Trio, samples: Samples, settings: RainSettings, count: int) -> Tensor:
    own = load_tokenizer(trio.reasoning)
    others = [
        load_tokenizer(model)
        for model in (trio.instruct, trio.pretrained)
        if has_tokenizer(model.path)
    ]
    chosen = shared_tokens(own, others, count)
    if settings.lm_head == "unseen":
        chosen &= unseen_tokens(samples, own, count)
    if not bool(chosen.any()):
        raise RainError(
            f"lm_head: {settings.lm_head} leaves no row to merge: no token that the three models "
            "have in common is one that only the instruction set's responses have; set lm_head: off"
        )
    return chosen


def shared_tokens(
    own: PreTrainedTokenizerBase, others: Sequence[PreTrainedTokenizerBase], count: int
) -> Tensor:
    """Which of `count` rows belong to a token with the same number in all tokenizers; bool.

    False for rows of padding, and for numbers that are different added tokens in two models.
    """
    vocabularies = [other.get_vocab() for other in others]
    same = [
        number
        for text, number in own.get_vocab().items()
        if number < count and all(one.get(text) == number for one in vocabularies)
    ]
    return _mask(same, count)


def unseen_tokens(samples: Samples, own: PreTrainedTokenizerBase, count: int) -> Tensor:
    """Which tokens responses of the instruction set write and the reasoning set never has; bool.

    Where the head is the embedding too, changing these rows changes nothing that the model reads in
    the reasoning set. Added tokens (markers, roles, ends of a turn) stay.
    """
    instruction = samples.instruction.samples if samples.instruction is not None else ()
    written = {one.input_ids[i] for one in instruction for i in one.response_positions}
    seen = {token for sample in samples.reasoning.samples for token in _own(sample)}
    kept = seen | set(own.get_added_vocab().values())
    return _mask([token for token in written - kept if token < count], count)


def _own(sample: ReasoningTokens) -> Iterator[int]:
    """The sample's tokens, but for an earlier turn of another one's: that has a response's."""
    lent = frozenset(sample.lent_positions)
    return (token for place, token in enumerate(sample.input_ids) if place not in lent)


def _mask(chosen: Sequence[int], count: int) -> Tensor:
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.tensor(sorted(chosen), dtype=torch.long)] = True
    return mask


def calibrate_head(
    layerwise: LayerwiseModel,
    head: HeadWeight,
    trio: TrioTensors,
    streams: Sequence[Stream],
    solver: LayerSites,
    max_rank: int,
) -> LayerResult:
    """The head's contribution to the calibration file, from what left the last layer."""
    sites, collected, device = head.sites, Collected(), solver.world.device
    (site,) = sites.owners
    with arriving(layerwise) as arrive:
        for stream in streams:
            for sample in range(len(stream)):
                rows = arrive(stream.store.get(sample).to(device))
                solver.picker(collected, stream, sample)(site, rows, None)

    def task_vector(weight: LinearWeight, _expert: int | None) -> Iterator[Tensor]:
        return head.task_vector(trio, device) if weight.name == head.name else iter(())

    solved = solver.solve(sites, collected, task_vector, max_rank)
    return LayerResult(sites, solved, tokens=head.rows)
