"""Which answer tokens count most in stream matching, and which of them keep their own teacher.

At most tokens of an answer both models say the same, whatever was asked. What makes it follow the
instruction is decided at few of them, so each answer token weighs by how far the instruct model's
distribution of the next token is from the reasoning model's, before anything is fitted. And where
the reasoning model says much better what the sample says next, it stays the teacher: there the
instruct model would say something else, such as a wrong result.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rain_mergekit.calibration.layer_passes import LayerPasses
from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.progress import Progress
from rain_mergekit.calibration.stream_texts import StreamTexts
from rain_mergekit.calibration.stream_types import HiddenStates
from rain_mergekit.calibration.token_teachers import TaughtText
from rain_mergekit.calibration.work_folder import WorkDir
from rain_mergekit.capture.activation_store import ActivationStore
from rain_mergekit.capture.layers_ahead import ReaderThread
from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.capture.next_tokens import comparing
from rain_mergekit.capture.streams import embed
from rain_mergekit.capture.text_batches import batches
from rain_mergekit.system.distributed import World

LOG = logging.getLogger(__name__)
# Nats: what a token counts for where both teachers agree, a tenth of the mean token's in the
# testbed. These are most of the tokens, and the answer has to stay right there.
FLOOR = 0.1
# For a token that the reasoning model excludes altogether, whose divergence has no bound.
MOST = 20.0


@dataclass(frozen=True)
class AnswerReader:
    """Both models, and how their hidden states are kept: as RunOptions say, spilled to `folder`.

    emphasis: whether answer tokens are weighed. margin: from how many nats on the reasoning model
    stays the teacher of a token; None: nowhere.
    """

    own: LayerwiseModel
    other: LayerwiseModel
    options: RunOptions
    world: World
    folder: Path
    emphasis: bool
    margin: float | None

    def emphasised(self, texts: StreamTexts, work: WorkDir, *, quiet: bool) -> StreamTexts:
        """The texts with an emphasis for each answer token: KL(instruct || reasoning) + FLOOR.

        They say, too, which tokens the reasoning model teaches itself. Every process reads its
        share of the texts; a run that goes on from `work` reads none. quiet: without a progress
        bar. Where the two tokenizers number the
        answers' tokens in two ways, no distributions can be compared, and the texts come back as
        they are.
        """
        if not comparable(texts):
            LOG.warning(
                "the two models number the tokens of the answers in two ways, so their next tokens "
                "cannot be compared: all answer tokens weigh alike (stream_emphasis: even), and "
                "the instruct model teaches all of them (teacher_margin: null)"
            )
            return texts
        found = work.found("answers", lambda: self._found(texts, quiet=quiet))
        # Where a model overflows, the text is named when it is fitted.
        apart, ahead = found.nan_to_num(nan=0.0, posinf=MOST)
        lengths = [one.answer for one in texts.readings]
        factors = apart.clamp(min=0.0) + FLOOR
        answers = zip(
            texts.instruction,
            torch.split(factors, lengths),
            torch.split(ahead, lengths),
            strict=True,
        )
        return replace(texts, instruction=[self._weighed(*one) for one in answers])

    def _found(self, texts: StreamTexts, *, quiet: bool) -> Tensor:
        """What `_compared` gives for all texts and processes, (2, n) float64."""
        lengths = [one.answer for one in texts.readings]
        found = torch.zeros(2, sum(lengths), dtype=torch.float64)
        places = self.world.part(torch.split(found, lengths, dim=1))
        part = texts.part(self.world)
        samples, tokens = len(part.compared), sum(part.compared)
        label, layers = "Answers, layer", len(self.own.layers)
        with Progress(layers, samples, tokens, label=label, quiet=quiet) as progress:
            for place, values in zip(places, self._compared(part, progress), strict=True):
                place.copy_(values)
        return self.world.sum(found)

    def _weighed(self, text: TaughtText, factors: Tensor, ahead: Tensor) -> TaughtText:
        """One text with what is known of its last tokens.

        ahead: how much likelier the instruct model finds what follows each of them, in nats.
        """
        if self.emphasis:
            text = replace(text, emphasis=tuple(factors.tolist()))
        if self.margin is not None:
            first = len(text.input_ids) - len(ahead)
            better = (ahead < -self.margin).nonzero().flatten().tolist()
            text = replace(text, better=frozenset(first + place for place in better))
        return text

    def _compared(self, texts: StreamTexts, progress: Progress) -> Iterator[Tensor]:
        """KL(instruct || reasoning), and how much likelier the former finds what follows.

        (2, n) float64 for the n answer tokens of each text; nothing follows the last of them.
        """
        own = [text.input_ids for text in texts.instruction]
        if not own:  # more processes than texts
            return
        with ExitStack() as stack:
            pairs = ((self.own, own), (self.other, [one.input_ids for one in texts.readings]))
            stores = []
            for number, (model, ids) in enumerate(pairs):
                place = self.folder / f"answers-{number}.activations"
                stores.append(stack.enter_context(self._ran(model, ids, place, progress)))
            compared = stack.enter_context(comparing(self.other, self.own))
            for index, reading in enumerate(texts.readings):
                mine, theirs = (
                    store.get(index)[-reading.answer :].to(self.world.device) for store in stores
                )
                following = torch.tensor([*reading.input_ids[1 - reading.answer :], -1])
                yield torch.stack(compared(theirs, mine, following))

    @contextmanager
    def _ran(
        self,
        model: LayerwiseModel,
        texts: Sequence[Sequence[int]],
        place: Path,
        progress: Progress,
    ) -> Iterator[ActivationStore]:
        """The hidden states with which each text leaves the model's last layer."""
        budget, device = self.options.activation_budget // 4, self.world.device
        lengths = [len(one) for one in texts]
        store = ActivationStore(lengths, model.hidden_size, model.dtype, budget, place)
        try:
            states = HiddenStates(store, [()] * len(texts))
            embed(model, texts, [states])
            states.batches[:] = batches(states.calls, lengths, self.options.tokens_together)
            several: dict[int, bool] = {}
            with ExitStack() as stack:
                indices = range(len(model.layers))
                if self.options.read_ahead:
                    thread = stack.enter_context(ReaderThread(self.options.loader))
                    stack.enter_context(model.reading_ahead(indices, thread))
                for index in indices:
                    progress.layer(index)
                    with model.layer(index) as layer:
                        passes = LayerPasses(layer, index, states, device, progress.sample, several)
                        for batch in passes.batches:
                            passes.advance(batch)
            yield store
        finally:
            store.close()


def comparable(texts: StreamTexts) -> bool:
    """Whether the instruct model reads every answer as the same token numbers."""
    return all(
        text.input_ids[1 - reading.answer :] == reading.input_ids[1 - reading.answer :]
        for text, reading in zip(texts.instruction, texts.readings, strict=True)
    )
