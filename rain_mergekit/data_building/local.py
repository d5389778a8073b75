"""A model in this process: answers by transformers' own `generate`, in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rain_mergekit.data_building.tasks import Sampling, Task, Written
from rain_mergekit.models import drawing
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.fingerprint import fingerprint
from rain_mergekit.models.generation import continue_prompts, load_model, render_prompt
from rain_mergekit.models.tokenizer import load_tokenizer
from rain_mergekit.text.markers import Markers


class LocalWriter:
    """Fixed batches, each with its own seed, so that an interrupted run continues identically."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        sampling: Sampling,
        *,
        device: str,
        dtype: torch.dtype | None,
        batch_size: int,
        chat_template_kwargs: Mapping[str, Any],
    ) -> None:
        self._checkpoint, self._sampling, self._batch_size = checkpoint, sampling, batch_size
        self._device, self._dtype = device, dtype
        self._template = chat_template_kwargs
        self._model: Any = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own, loaded when it is needed."""
        return load_tokenizer(self._checkpoint)

    @property
    def identity(self) -> Mapping[str, Any]:
        """The model's identity: its weights, not their path."""
        return {"model": fingerprint(self._checkpoint.path)}

    def opens_block(self, prompt: str, markers: Markers) -> bool:
        """Whether the chat template has written the open marker before the model begins."""
        return bool(markers.opening(self._head(prompt)))

    def _head(self, prompt: str) -> str:
        return render_prompt(self.tokenizer, prompt, self._template)

    def write(
        self, tasks: Sequence[Task], is_done: Callable[[Task], bool]
    ) -> Iterator[list[tuple[Task, Written]]]:
        """One batch after another; prompts of similar length share one. Loads the model late."""
        heads = {task: self._head(task.prompt) for task in tasks}
        order = sorted(tasks, key=lambda task: (len(heads[task]), task.key))
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            if all(is_done(task) for task in batch):
                continue
            answers = self._answer(batch, [heads[task] for task in batch])
            pairs = zip(batch, answers, strict=True)
            yield [(task, written) for task, written in pairs if not is_done(task)]

    def _answer(self, batch: Sequence[Task], heads: list[str]) -> list[Written]:
        model = self._loaded()
        seeds = [task.seed(self._sampling.seed) for task in batch]
        torch.manual_seed(int(hashlib.sha256(repr(seeds).encode()).hexdigest()[:8], 16))
        texts = continue_prompts(
            model, self.tokenizer, heads, self._sampling.max_new_tokens, self._drawing()
        )
        return [Written(one.text, None, one.finished, one.tokens) for one in texts]

    def _loaded(self) -> Any:
        """The model, loaded when it is first needed."""
        if self._model is None:
            self._model = load_model(self._checkpoint, self._device, self._dtype)
        return self._model

    def _drawing(self) -> dict[str, Any]:
        """The model's own sampling settings, overridden by the user's."""
        own, asked = self._model.generation_config, self._sampling
        if asked.temperature == 0 or (asked.temperature is None and not own.do_sample):
            return {"do_sample": False}
        found = {name: getattr(own, name, None) for name in drawing.FIELDS}
        given = {"temperature": asked.temperature, "top_p": asked.top_p}
        used = {**found, **{name: value for name, value in given.items() if value is not None}}
        return {"do_sample": True, **{n: v for n, v in used.items() if v is not None}}
