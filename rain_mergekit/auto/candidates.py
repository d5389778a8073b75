"""The models that the user named and their roles, from headers, before any download."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from transformers import PreTrainedTokenizerBase

from rain_mergekit.errors import RainError
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.header_copy import Preview, preview
from rain_mergekit.models.loading import LoadOptions, open_model, reference_of, require_plain
from rain_mergekit.models.tokenizer import has_tokenizer, load_tokenizer
from rain_mergekit.text.marker_detection import shown_markers
from rain_mergekit.text.markers import Markers


@dataclass(frozen=True)
class Candidate:
    """One model: as it was named, and what its small files and headers say.

    shown: the thinking markers that its chat template or tokenizer shows.
    """

    name: str
    seen: Preview
    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase | None
    shown: tuple[Markers, ...]

    @property
    def talks(self) -> bool:
        """Whether it has a chat template."""
        return self.tokenizer is not None and bool(self.tokenizer.chat_template)

    @property
    def pinned(self) -> str:
        """A reference that stays valid: with the model's commit, or an absolute path."""
        if self.seen.commit is None:
            return str(Path(self.name).resolve())
        return f"{self.name.partition('@')[0]}@{self.seen.commit}"


def look_at(name: str, place: Path, load: LoadOptions, template: Mapping[str, Any]) -> Candidate:
    """Fetch a model's small files and headers; `place` is an empty folder that must be kept.

    Raises RainError if there is no such model, or it is none that can be read.
    """
    reference = reference_of(name)
    if reference.lora is not None:
        raise RainError(
            f"{name}: a model with an adapter: `mergekit-rain auto` takes whole models; write a "
            "configuration for it, and use `mergekit-rain merge`"
        )
    trust = load.trust_remote_code
    seen = preview(reference, place, load.transformers_cache, trust=trust)
    with called({seen.folder: name}):
        folder = ModelReference.model_validate({"model": {"path": seen.folder}})
        checkpoint = open_model(folder, load)
        require_plain(checkpoint, name)
        tokenizer = load_tokenizer(checkpoint) if has_tokenizer(seen.folder) else None
        shown = tokenizer is not None and tokenizer.chat_template
        markers = tuple(shown_markers(tokenizer, template)) if shown and tokenizer else ()
    return Candidate(name, seen, checkpoint, tokenizer, markers)


@contextmanager
def called(names: Mapping[str, str]) -> Iterator[None]:
    """Inside the block errors name the models as the user did, not by temporary folders."""
    try:
        yield
    except RainError as error:
        text = str(error)
        for folder, name in names.items():
            text = text.replace(folder, name)
        raise RainError(text) from None


def find_roles(
    found: Sequence[Candidate], markers: Sequence[tuple[str, str]]
) -> tuple[dict[str, Candidate], list[str]]:
    """The model of each role, and what made us differ from the order in which they were named.

    The reasoning model is the one that shows thinking markers, the pretrained one has no chat
    template; where that does not decide, the order does. RainError if none can be the reasoning
    model, or two are one.
    """
    _refuse_twice(found)
    first, second, *third = found
    notes: list[str] = []
    if not markers and not first.shown and second.shown:
        notes.append(f"{second.name} shows thinking markers and {first.name} does not")
        first, second = second, first
    if third and not second.talks and third[0].talks:
        notes.append(f"{third[0].name} has a chat template and {second.name} has none")
        second, third = third[0], [second]
    if not first.talks:
        raise RainError(
            f"{first.name}: has no chat template, so it cannot be the reasoning model: name a "
            "reasoning model first"
        )
    if not first.shown and not markers:
        raise RainError(
            f"{first.name}: neither its chat template nor its tokenizer shows known thinking "
            "markers: name a reasoning model first, or give --markers OPEN CLOSE"
        )
    roles = {"reasoning": first, "instruct": second}
    return {**roles, **({"pretrained": third[0]} if third else {})}, notes


def _refuse_twice(found: Sequence[Candidate]) -> None:
    names = [one.pinned for one in found]
    for one, name in zip(found, names, strict=True):
        if names.count(name) > 1:
            raise RainError(f"{one.name}: is named twice; name two or three different models")
