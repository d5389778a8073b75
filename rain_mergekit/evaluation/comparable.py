"""Whether two models can be compared: same tokens, same reasoning model."""

from __future__ import annotations

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.errors import RainError
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.empty_model import text_config
from rain_mergekit.models.fingerprint import fingerprint
from rain_mergekit.models.loading import read_model_config
from rain_mergekit.models.tokenizer import load_tokenizer


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
            f"{merged.reference}) and not only in padding, so that the distributions of the next "
            "token cannot be compared"
        )


def check_reasoning(file: CalibrationFile, reasoning: Checkpoint) -> None:
    """RainError if the calibration was made with another reasoning model."""
    recorded = file.models["reasoning"]
    found = fingerprint(reasoning.path) if recorded.fingerprint else {}
    differing = recorded.differences(found)
    if differing:
        raise RainError(
            f"{reasoning.reference}: is not the reasoning model of {file.path} (it differs in "
            f"{', '.join(sorted(differing))}); name the right one with --against"
        )
