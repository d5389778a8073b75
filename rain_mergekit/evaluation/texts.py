"""The texts with thinking that a merge is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.config.settings_parser import parse_settings
from rain_mergekit.errors import RainError
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.tokenizer import load_tokenizer
from rain_mergekit.system.evenly_spaced import evenly_spaced
from rain_mergekit.system.json_samples import file_digest
from rain_mergekit.text.calibration_sets import DataSet, load_reasoning
from rain_mergekit.text.marker_detection import find_markers, tokenizer_markers
from rain_mergekit.text.markers import Markers
from rain_mergekit.text.token_positions import ReasoningTokens

# Settings with which `parse_settings` requires no instruction set.
_NO_OTHER_SET = {"fit": "projection", "projection": "orthogonal", "coefficients": "off"}


@dataclass(frozen=True)
class Texts:
    """Which texts with thinking to measure on; count None: all; markers None: found in them.

    path "": there are none, and markers are those that the tokenizer knows. optional: texts without
    a block count as a whole.
    """

    path: str
    count: int | None = None
    markers: Markers | None = None
    window: int = 5
    max_tokens: int | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False


def texts_from_settings(settings: Mapping[str, Any], path: str, count: int | None) -> Texts:
    """Texts of that file, with markers, window and template as in a calibration's settings."""
    names = ("markers", "blocks", "window", "chat_template_kwargs")
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
        optional=known.blocks == "optional",
    )


def recorded_texts(file: CalibrationFile) -> str | None:
    """The reasoning set that the calibration was made from, if it is still there unchanged."""
    recorded = (file.header.get("data") or {}).get("reasoning") or {}
    path, digest = recorded.get("path"), recorded.get("sha256")
    if not isinstance(path, str):
        return None
    found = file_digest(path)
    return path if found is not None and found == digest else None


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
    return [data.samples[index] for index in evenly_spaced(range(len(data.samples)), count)], data


def markers_of(texts: Texts, tokenizer: PreTrainedTokenizerBase) -> Markers:
    """The markers of the texts, or those that the model of this tokenizer writes."""
    found = texts.markers
    if found is None and texts.path:
        found = find_markers(texts.path, tokenizer, texts.chat_template_kwargs)
    elif found is None:
        found = tokenizer_markers(tokenizer, texts.chat_template_kwargs)
    return replace(found, optional=found.optional or texts.optional)
