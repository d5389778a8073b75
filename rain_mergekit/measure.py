"""What a merge did, measured on the models: drift at think positions, and moved weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from transformers import PreTrainedTokenizerBase

from rain_mergekit.artifact import CalibrationFile
from rain_mergekit.checkpoint import Checkpoint, fingerprint
from rain_mergekit.data import DataSet, Markers, ReasoningTokens, load_reasoning
from rain_mergekit.decoders import text_config
from rain_mergekit.detection import find_markers
from rain_mergekit.errors import RainError
from rain_mergekit.evaluation import Drift, drift, load_model
from rain_mergekit.features import spread
from rain_mergekit.models import LoadOptions, load_tokenizer, open_model, read_model_config
from rain_mergekit.reading import file_digest
from rain_mergekit.settings import parse_settings
from rain_mergekit.stored import Stored, grouped, short_names

_ROWS = 4096
# What parse_settings needs beside, so that no instruction set is asked for.
_NO_OTHER_SET = {"projection": "orthogonal", "coefficients": "off"}


@dataclass(frozen=True)
class Texts:
    """Which texts with thinking to measure on; count None: all; markers None: found in them."""

    path: str
    count: int | None = None
    markers: Markers | None = None
    window: int = 5
    max_tokens: int | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def texts_like(settings: Mapping[str, Any], path: str, count: int | None) -> Texts:
    """Texts of that file, with markers, window and template as in a calibration's settings."""
    names = ("markers", "window", "chat_template_kwargs")
    recorded = {name: settings[name] for name in names if name in settings}
    try:
        known = parse_settings({**recorded, "reasoning_data": path, **_NO_OTHER_SET}, path)
        markers = known.marker_texts
    except RainError:  # of another program, or another version
        return Texts(path, count)
    return Texts(
        path=path,
        count=count,
        markers=markers,
        window=known.window,
        chat_template_kwargs=known.chat_template_kwargs,
    )


def recorded_texts(file: CalibrationFile) -> str | None:
    """The reasoning set that the calibration was made from, if it is still there unchanged."""
    recorded = (file.header.get("data") or {}).get("reasoning") or {}
    path, digest = recorded.get("path"), recorded.get("sha256")
    if not isinstance(path, str):
        return None
    found = file_digest(path)
    return path if found is not None and found == digest else None


def open_checkpoint(name: str, options: LoadOptions) -> Checkpoint:
    """The model of that reference, or in that folder; RainError if it cannot be found."""
    if Path(name).is_dir():  # a folder's name may hold what has a meaning in a reference
        return open_model(ModelReference.model_validate({"model": {"path": name}}), options)
    try:
        reference = ModelReference.parse(name)
    except (RuntimeError, ValueError) as error:
        raise RainError(f"{name}: is not a model reference: {error}") from None
    return open_model(reference, options)


class Ruler:
    """Measures L_think of several models against one, which is loaded once."""

    def __init__(
        self, reasoning: Checkpoint, texts: Texts, device: str, dtype: torch.dtype | None
    ) -> None:
        self._device, self._dtype, self._reasoning = device, dtype, reasoning
        self._samples = read_texts(reasoning, texts)[0]
        self._reference = load_model(reasoning, device, dtype)

    def drift(self, merged: Checkpoint) -> Drift:
        """The merged model's drift; it is loaded as a whole and let go."""
        check_same_tokens(self._reasoning, merged)
        model = load_model(merged, self._device, self._dtype)
        return drift(self._reference, model, self._samples)


def read_texts(
    reasoning: Checkpoint, texts: Texts
) -> tuple[list[ReasoningTokens], DataSet[ReasoningTokens]]:
    """The samples to measure on, evenly spaced, and the whole set that they come from."""
    tokenizer = load_tokenizer(reasoning)
    data = load_reasoning(
        texts.path,
        tokenizer,
        markers=markers_of(texts, tokenizer),
        chat_template_kwargs=texts.chat_template_kwargs,
        window=texts.window,
        max_tokens=texts.max_tokens,
        keep_response=True,
    )
    count = texts.count or len(data.samples)
    return [data.samples[index] for index in spread(range(len(data.samples)), count)], data


def markers_of(texts: Texts, tokenizer: PreTrainedTokenizerBase) -> Markers:
    """The markers of the texts, or those that the model of this tokenizer writes."""
    return texts.markers or find_markers(texts.path, tokenizer, texts.chat_template_kwargs)


def check_same_tokens(reasoning: Checkpoint, merged: Checkpoint) -> None:
    """RainError unless the vocabularies agree but for padding, which mergekit may leave out."""
    models = (reasoning, merged)
    sizes = [int(text_config(read_model_config(model)).vocab_size) for model in models]
    if sizes[0] == sizes[1]:
        return
    both = (
        {t: i for t, i in load_tokenizer(m).get_vocab().items() if i < min(sizes)} for m in models
    )
    if next(both) != next(both):
        raise RainError(
            f"the vocabularies differ ({sizes[0]} tokens in {reasoning.reference}, {sizes[1]} in "
            f"{merged.reference}) and not in padding alone, so that the distributions of the next "
            "token cannot be compared"
        )


def check_reasoning(file: CalibrationFile, reasoning: Checkpoint) -> None:
    """RainError if the calibration was made with another reasoning model."""
    recorded = file.models["reasoning"].fingerprint
    found = fingerprint(reasoning.path) if recorded else {}
    differing = [part for part, digest in (recorded or {}).items() if found.get(part) != digest]
    if differing:
        raise RainError(
            f"{reasoning.reference}: is not the reasoning model of {file.path} (it differs in "
            f"{', '.join(sorted(differing))}); name the right one with --against"
        )


def moved(
    file: CalibrationFile, reasoning: Checkpoint, merged: Checkpoint
) -> dict[str, dict[int, float]]:
    """||W* - W_R|| / ||W_R|| (Frobenius) of the listed weights, by module and layer.

    The experts of a layer are taken together. Two tensors are in memory at a time. Raises
    RainError where one is missing or of another shape.
    """
    groups = grouped(file)
    names, models = short_names(kind for kind, _ in groups), (Stored(reasoning), Stored(merged))
    found: dict[str, dict[int, float]] = {}
    for (kind, layer), members in groups.items():
        pairs = (_change(*models, name, tokens=file.tensors[name].tokens) for name in members)
        norms, changes = zip(*pairs, strict=True)
        norm = math.hypot(*norms)
        found.setdefault(names[kind], {})[layer] = math.hypot(*changes) / norm if norm else 0.0
    return found


def _change(reasoning: Stored, merged: Stored, name: str, *, tokens: bool) -> tuple[float, float]:
    """||W_R||, and ||W* - W_R||; of tokens those that both have. In float32 block by block."""
    before, after = reasoning.get(name), merged.get(name)
    if tokens:
        before, after = (weight[: min(len(before), len(after))] for weight in (before, after))
    if before.shape != after.shape:
        raise RainError(
            f"{merged.checkpoint.reference}: tensor {name} has shape {list(after.shape)}, expected "
            f"{list(before.shape)}: it was not merged from {reasoning.checkpoint.reference}"
        )
    parts = list(zip(torch.split(before, _ROWS), torch.split(after, _ROWS), strict=True))
    norms = [float(old.float().norm()) for old, _ in parts]
    changes = [float((new.float() - old.float()).norm()) for old, new in parts]
    return math.hypot(*norms), math.hypot(*changes)
