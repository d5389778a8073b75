"""A model in this process, by transformers' continuous batching: no answer waits for another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from transformers import ContinuousBatchingConfig

from rain_mergekit.data_building.local import LocalWriter
from rain_mergekit.data_building.tasks import Task, Written
from rain_mergekit.errors import RainError
from rain_mergekit.models.generation import generation_settings, until_end

_PAGE = 256  # tokens in one block of the cache, transformers' own default
_WAIT = 1.0  # seconds between two looks at whether the model still runs


class ContinuousWriter(LocalWriter):
    """Answers as they are finished; the next prompt takes the place of each.

    The seed decides only where the first token is drawn: what is drawn together depends on which
    answers end when, so two runs give other samples. Greedy answers are the same up to rounding.
    """

    @property
    def identity(self) -> Mapping[str, Any]:
        """The model's identity, and that its answers were not drawn in fixed batches."""
        return {**super().identity, "continuous": True}

    def write(
        self, tasks: Sequence[Task], is_done: Callable[[Task], bool]
    ) -> Iterator[list[tuple[Task, Written]]]:
        """Each answer once it is finished. RainError if the model ends before all are."""
        todo = {task.key: task for task in tasks if not is_done(task)}
        if not todo:
            return
        heads = {key: self._encoded(task.prompt) for key, task in todo.items()}
        model, limit = self._loaded(), self._sampling.max_new_tokens
        settings = generation_settings(model, self.tokenizer, limit, self._drawing())
        how = self._memory(max(map(len, heads.values())) + limit, model.device.type)
        torch.manual_seed(self._sampling.seed)
        with model.continuous_batching_context_manager(
            generation_config=settings, continuous_batching_config=how
        ) as manager:
            for key, ids in heads.items():
                manager.add_request(ids, request_id=key, max_new_tokens=limit)
            for _ in range(len(todo)):
                found = _finished(manager)
                text = until_end(model, self.tokenizer, list(found.generated_tokens))
                yield [
                    (todo[found.request_id], Written(text.text, None, text.finished, text.tokens))
                ]

    def _encoded(self, prompt: str) -> list[int]:
        found: list[int] = self.tokenizer(self._head(prompt), add_special_tokens=False)["input_ids"]
        return found

    def _memory(self, longest: int, device: str) -> ContinuousBatchingConfig:
        """Room for a batch of the longest answers; on a GPU what is free there, as transformers."""
        known = {field.name for field in fields(ContinuousBatchingConfig)}
        seed: dict[str, Any] = {"seed": self._sampling.seed} if "seed" in known else {}
        if device != "cpu":
            return ContinuousBatchingConfig(**seed)
        blocks = self._batch_size * -(-longest // _PAGE)
        return ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=_PAGE, **seed)


def _finished(manager: Any) -> Any:
    """The next answer that is done; RainError if it failed, or nothing runs any more."""
    while True:
        found = manager.get_result(timeout=_WAIT)
        if found is None and not manager.is_running():
            raise RainError(
                "continuous batching ended before all answers were there; the answers so far are "
                "kept: leave out --continuous, or lower --batch-size"
            )
        if found is not None and found.is_finished():
            if found.error is not None:
                raise RainError(
                    f"continuous batching gives no answer: {found.error}; leave out --continuous"
                )
            return found
