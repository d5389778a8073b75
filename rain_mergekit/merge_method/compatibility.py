"""Check that a calibration belongs to the models of this merge, before any tensor is merged."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from safetensors import safe_open
from torch import Tensor

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.errors import RainError
from rain_mergekit.merge_method.stored_tensors import added_later, stored_otherwise

_LISTED, _TOKENS = 20, 4096
_LAYER = re.compile(r"\.\d+\.")
LOG = logging.getLogger(__name__)


def check_models(calibration: CalibrationFile, models: Mapping[str, Any]) -> None:
    """Compare the reasoning model's fingerprint, and all shapes of the three models.

    Args:
        calibration: the open calibration.
        models: mergekit's input id by role. Models that mergekit has not opened (tensors merged in
            memory) cannot be checked here and are left out.

    Raises:
        RainError: one message with everything that does not fit.
    """
    opened = {
        role: LoaderCache().get(model).index
        for role, model in models.items()
        if isinstance(model, ModelReference) and model in LoaderCache.loaders
    }
    other: str | None = None
    if "reasoning" in opened:
        folder = opened["reasoning"].base_path
        other = _other_reasoning_model(calibration, models["reasoning"], folder)
    problems: list[str] = []
    added = added_later(calibration, opened)
    for role, index in opened.items():
        who = f"{role} model {models[role]}"
        remark = _quantised(models[role], index)
        if remark is not None:
            problems.append(f"{role} model {remark}")
        else:
            problems += _problems(calibration, who, index, added)
    problems += _unlisted_problems(calibration, models, opened)
    if problems:
        more = len(problems) - _LISTED
        lines = problems[:_LISTED] + ([f"and {more} more"] if more > 0 else [])
        raise RainError(
            f"calibration file {calibration.path!r} does not fit these models:\n  "
            + "\n  ".join([other, *lines] if other else lines)
            + "\nMerge the models that it was made for, or calibrate again with these."
        )
    if other:
        raise RainError(
            f"calibration file {calibration.path!r} {other}; set base_model to the recorded "
            "model, or calibrate again"
        )
    if "reasoning" in opened:
        _compare_tokenizer(calibration, opened["reasoning"].base_path)
    if len(opened) == len(models) and all(index.is_safetensors for index in opened.values()):
        _check_others(calibration, models, opened)


def _compare_tokenizer(calibration: CalibrationFile, folder: str) -> None:
    """Only a warning: the weights are the same, and the tokenizer may have been repaired."""
    from rain_mergekit.models.tokenizer import tokenizer_digest  # noqa: PLC0415 - loads transformers

    recorded = (calibration.header.get("run") or {}).get("tokenizer")
    if recorded is not None and recorded != tokenizer_digest(folder):
        LOG.warning(
            "the tokenizer or the chat template of %s has changed since the calibration %s: what "
            "is protected was measured with the earlier ones",
            folder,
            calibration.path,
        )


def check_source(model: object, name: str, tensor: Tensor) -> None:
    """Refuse slices that move layers: `tensor` must be what `model` stores under `name`.

    The bases belong to a layer's own inputs, and mergekit tells a method only the name that the
    tensor will have in the result. One row of the checkpoint is compared.
    """
    with _stored_slice(model, name) as stored:
        if stored is None:
            return
        row = stored[:1]
    if not torch.equal(row.to(tensor.dtype), tensor[:1].to("cpu")):
        raise RainError(
            f"{name} of the result is made from another tensor of {model}: the slices move layers, "
            "and a calibration holds for layers in their own places; merge first, then move them"
        )


def check_tokens(model: object, name: str, tensor: Tensor, rows: Tensor) -> None:
    """Refuse a vocabulary in another order: a token's row must be where `model` stores it.

    rows: as the calibration has them; those that are not zero are compared, block by block.
    """
    with _stored_slice(model, name) as stored:
        if stored is None:
            return
        count = min(stored.get_shape()[0], tensor.shape[0], len(rows))
        for start in range(0, count, _TOKENS):
            block = slice(start, min(count, start + _TOKENS))
            merged = rows[block] != 0
            own = stored[block].to(tensor.dtype)[merged]
            if not torch.equal(own, tensor[block].to("cpu")[merged]):
                raise RainError(
                    f"{name}: its rows are in another order than those of {model}, for which the "
                    "calibration says which of them are merged; use `tokenizer: {source: base}`"
                )


@contextmanager
def _stored_slice(model: object, name: str) -> Iterator[Any]:
    """The tensor as `model` stores it, to read parts of; None where mergekit has no such file."""
    index = None
    if isinstance(model, ModelReference) and model in LoaderCache.loaders:
        index = LoaderCache().get(model).index
    if (
        index is None
        or not index.is_safetensors
        or name not in index.tensor_paths
        or _hollow(index)
    ):
        yield None
        return
    with safe_open(Path(index.base_path) / index.tensor_paths[name], framework="pt") as file:
        yield file.get_slice(name)


def _hollow(index: Any) -> bool:
    """Whether a quantised model stands behind the folder: its file has no numbers."""
    from rain_mergekit.models.source import published_folder  # noqa: PLC0415 - likewise

    place = str(index.base_path)
    return published_folder(place) != place


def _other_reasoning_model(
    calibration: CalibrationFile, model: ModelReference, folder: str
) -> str | None:
    from rain_mergekit.models.fingerprint import fingerprint  # noqa: PLC0415 - loads transformers

    record = calibration.models["reasoning"]
    if record.fingerprint is None:
        LOG.warning(
            "calibration file %s has no fingerprint: whether it was made for %s is not checked",
            calibration.path,
            model,
        )
        return None
    found = fingerprint(folder)
    different = record.differences(found)
    if not different:
        return None
    return (
        f"was made for another reasoning model: it records {record.reference}, and the base_model "
        f"{model} differs in {', '.join(different)}{_hint(calibration, found)}"
    )


def _check_others(
    calibration: CalibrationFile, models: Mapping[str, Any], indices: Mapping[str, Any]
) -> None:
    """Models other than the recorded ones may be intended; refuse them only if they cannot work."""
    from rain_mergekit.checks.task_vector_size import check_task_vector  # noqa: PLC0415 - likewise
    from rain_mergekit.checks.tokenizers import check_tokenizers  # noqa: PLC0415 - likewise
    from rain_mergekit.models.fingerprint import fingerprint  # noqa: PLC0415 - loads transformers

    places = {role: index.base_path for role, index in indices.items()}
    indices = {role: index for role, index in indices.items() if not _hollow(index)}
    found = {role: fingerprint(index.base_path) for role, index in indices.items()}
    made = {role: calibration.models[role].fingerprint for role in found}
    other = [role for role in found if made[role] is not None and made[role] != found[role]]
    for role in other:
        recorded = calibration.models[role].reference
        LOG.warning("the calibration was made with another %s model: %s", role, recorded)
    if other or None in made.values():
        names = {role: str(model) for role, model in models.items()}
        accepted = (calibration.header.get("settings") or {}).get("accept")
        accept = accepted if isinstance(accepted, list) else ()
        # a number may be another token in another model, and sampled rows would not belong together
        inner = [name for name, plan in calibration.tensors.items() if not plan.tokens]
        gamma = calibration.gamma
        noted = check_task_vector(names, found, indices, inner, accept, gamma)
        folders = {role: places[role] for role in ("reasoning", *other)}
        noted += check_tokenizers(folders, names, _markers(calibration), accept)
        for text in noted:
            LOG.warning("%s", text)


def _markers(calibration: CalibrationFile) -> list[str]:
    """The markers that the file records; that section of the header may have any form."""
    data = calibration.header.get("data")
    pairs = data.get("markers") if isinstance(data, Mapping) else None
    lists = [pair for pair in pairs if isinstance(pair, list)] if isinstance(pairs, list) else []
    return [text for pair in lists for text in pair if isinstance(text, str)]


def _hint(calibration: CalibrationFile, found: Mapping[str, str]) -> str:
    for role in ("instruct", "pretrained"):
        if calibration.models[role].fingerprint == found:
            return f" (it is the {role} model of the calibration: are the models swapped?)"
    return ""


def _quantised(model: ModelReference, index: Any) -> str | None:
    """What to do about a model that is published quantised; None where its weights are plain."""
    from rain_mergekit.models.published_format import quantised_remark  # noqa: PLC0415 - transformers

    return quantised_remark(model, index.base_path) if index.is_safetensors else None


def _problems(
    calibration: CalibrationFile, who: str, index: Any, added: AbstractSet[str]
) -> list[str]:
    """How a model differs from the calibration: shapes, types, missing tensors.

    added: tensors that mergekit leaves out, and which may be missing.
    """
    from rain_mergekit.models.checkpoint import PLAIN_TYPES, header_entries  # noqa: PLC0415 - transformers

    if not index.is_safetensors:
        return []  # pickled shards have no header to look at: each tensor is checked when merged
    plans = calibration.tensors
    entries = header_entries(index, plans)
    problems = [
        f"{who}: {name} has shape {list(shape)}, the calibration expects {list(plan.shape)}"
        for name, (_, shape) in entries.items()
        if shape[(plan := plans[name]).tokens :] != plan.shape[plan.tokens :]
    ]
    problems += [
        f"{who}: {name} is stored as {kind}, expected a plain weight: it is quantised"
        for name, (kind, _) in entries.items()
        if kind not in PLAIN_TYPES
    ]
    # a head that one model lacks is its embedding: mergekit looks there
    absent = [name for name, plan in plans.items() if name not in entries and not plan.tokens]
    absent = [name for name in absent if name not in added]
    if absent:
        found = stored_otherwise(index, absent)
        problems += [f"{who}: {name} is missing" for name in absent if name not in found]
    return sorted(problems)


def _unlisted_problems(
    calibration: CalibrationFile, models: Mapping[str, Any], opened: Mapping[str, Any]
) -> Iterator[str]:
    """Shapes that differ in the listed layers, where the reasoning model's tensors are taken.

    mergekit compares them too, one by one when each has its turn.
    """
    from rain_mergekit.models.checkpoint import header_shapes  # noqa: PLC0415 - loads transformers

    indices = {role: index for role, index in opened.items() if index.is_safetensors}
    if "reasoning" not in indices:
        return
    own = indices.pop("reasoning")
    layers = set(map(_layer, calibration.tensors)) - {None}
    others = (name for name in own.tensor_paths if name not in calibration.tensors)
    expected = header_shapes(own, (name for name in others if _layer(name) in layers))
    for role, index in indices.items():
        for name, shape in sorted(header_shapes(index, expected).items()):
            if shape != expected[name]:
                yield (
                    f"{role} model {models[role]}: {name} has shape {list(shape)}, the reasoning "
                    f"model's is {list(expected[name])}"
                )


def _layer(name: str) -> str | None:
    """The name up to the number of its layer."""
    found = _LAYER.search(name)
    return None if found is None else name[: found.end()]
