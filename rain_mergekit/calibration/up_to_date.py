"""Whether a calibration file was made from this configuration, and what differs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rain_mergekit.calibration_file.container import LENGTH_BYTES, MAX_HEADER
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.schema import FORMAT, VERSION, ModelRecord
from rain_mergekit.config.merge_config import RainConfig
from rain_mergekit.config.setting_types import RegMeanSettings
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.errors import RainError
from rain_mergekit.models.adapters import adapter_digest
from rain_mergekit.models.fingerprint import fingerprint
from rain_mergekit.models.loading import LoadOptions, open_model
from rain_mergekit.models.tokenizer import tokenizer_digest
from rain_mergekit.system.atomic_file import destination, refuse_foreign
from rain_mergekit.system.json_samples import file_digest
from rain_mergekit.system.untrusted_input import is_lfs_pointer

# Where the data lie does not matter; their digests are compared instead.
_PATHS = ("reasoning_data", "instruction_data")
# Settings added later, with the value that gives the earlier behaviour.
_AS_BEFORE = {
    "blocks": "required",
    "gamma": 0.0,
    "later_turns": 0.0,
    "lm_head": "off",
    "regmean": RegMeanSettings().model_dump(mode="json"),
    "teach_instructions": False,
}


@dataclass(frozen=True)
class Comparison:
    """differences: why the file has to be made (again); unchecked: what could not be compared."""

    differences: tuple[str, ...]
    unchecked: tuple[str, ...] = ()

    @property
    def current(self) -> bool:
        """Whether the file can be used as it is."""
        return not self.differences


def compare(config: RainConfig, options: LoadOptions) -> Comparison:
    """Compare the calibration file with the configuration that names it.

    Raises RainError where calibrating again would be wrong: somebody else's file, a newer format,
    or swapped roles.
    """
    path = config.calibration
    protect_foreign(path)
    if not path.exists():
        return Comparison((f"{path} does not exist",))
    try:
        file = CalibrationFile.open(path)
        file.verify()
    except RainError as error:
        if _version(_metadata(path)) > VERSION:
            raise
        return Comparison((str(error),))
    try:
        data, unchecked = _data(file.header, config.settings)
        models = list(_models(file.models, config, options))
        models += _adapters(file.header, config, options)
        models += _tokenizer(file.header, config, options)
        settings = list(_settings(file.header, config.settings))
        kind = [] if file.kind == config.method else [f"it is for merge_method: {file.kind}"]
        return Comparison((*kind, *settings, *data, *models), tuple(unchecked))
    finally:
        file.close()


def protect_foreign(path: Path) -> None:
    """Raise RainError if `path` holds something else than a calibration file, or cannot be one."""
    if is_lfs_pointer(path):
        raise RainError(
            f"{path}: a git-lfs pointer, not the file itself: run `git lfs pull` in that folder"
        )
    ours = destination(path).is_file() and _metadata(path).get("format") == FORMAT
    remedy = "correct `parameters.calibration`, or move the file away"
    refuse_foreign(path, "a calibration file", remedy, ours=ours)


def _metadata(path: Path) -> dict[str, Any]:
    """The safetensors metadata, read leniently: of a damaged file too, as far as it goes."""
    try:
        with path.open("rb") as file:
            length = min(int.from_bytes(file.read(LENGTH_BYTES), "little"), MAX_HEADER)
            text = file.read(length)
        document = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return _cut_metadata(path)
    found = document.get("__metadata__") if isinstance(document, dict) else None
    return found if isinstance(found, dict) else {}


def _cut_metadata(path: Path) -> dict[str, Any]:
    """What can be read of a file whose header is cut off or broken."""
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError:
        return {}
    return {"format": FORMAT} if f'"format":"{FORMAT}"'.encode() in start else {}


def _version(metadata: Mapping[str, Any]) -> int:
    text = str(metadata.get("format_version", ""))
    return int(text) if text.isdecimal() and len(text) < 10 else 0


def _settings(header: Mapping[str, Any], wanted: RainSettings) -> Iterator[str]:
    recorded = header.get("settings") or {}
    # Paths are not compared; placeholders make the rest readable.
    completed = {"reasoning_data": "-", "instruction_data": "-", **recorded}
    try:
        made = RainSettings.model_validate(completed)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, item["loc"])) for item in error.errors())
        yield f"its settings cannot be read ({fields})"
        return
    old, new = made.numbers(), wanted.numbers()
    for name, value in new.items():
        if name in _PATHS:
            continue
        if recorded and name not in recorded:  # the file was written before this setting existed
            if _AS_BEFORE.get(name) == value:
                continue
            yield (
                f"rain.{name} is {_short(value)}, and the file was written before this setting "
                "existed"
            )
        elif old[name] != value:
            yield f"rain.{name} is {_short(value)}, was {_short(old[name])}"


def _data(header: Mapping[str, Any], settings: RainSettings) -> tuple[list[str], list[str]]:
    """Differences, and what cannot be compared because the file is not here."""
    differences, unchecked = [], []
    sets = {"reasoning": settings.reasoning_data}
    if settings.needs_instruction_data and settings.instruction_data is not None:
        sets["instruction"] = settings.instruction_data
    recorded = header.get("data") or {}
    for name, path in sets.items():
        found = file_digest(path)
        record = recorded.get(name)
        digest = record.get("sha256") if isinstance(record, dict) else None
        if found is None:
            unchecked.append(f"rain.{name}_data: {path} not found; cannot check whether it changed")
        elif digest is None:
            differences.append(f"rain.{name}_data: it was made without")
        elif found != digest:
            differences.append(f"rain.{name}_data: the content of {path} has changed")
    return differences, unchecked


def _models(
    recorded: Mapping[str, ModelRecord], config: RainConfig, options: LoadOptions
) -> Iterator[str]:
    found = {role: _fingerprint(model, options) for role, model in config.models.items()}
    made = {role: record.fingerprint for role, record in recorded.items()}
    _refuse_swapped(made, found, config)
    for role, model in config.models.items():
        record = recorded[role]
        if record.fingerprint is None:
            if record.reference != str(model):
                yield f"the {role} model is {model}, was {record.reference}"
            continue
        parts = record.differences(found[role])
        if parts and record.reference != str(model):
            yield f"the {role} model is {model}, was {record.reference}"
        elif parts:
            yield f"the {role} model {model} has changed ({', '.join(parts)})"


def _adapters(header: Mapping[str, Any], config: RainConfig, options: LoadOptions) -> Iterator[str]:
    """Compare adapters by their own files, because fingerprints sample only a few rows."""
    for role, model in config.models.items():
        record = header.get("models", {}).get(role)
        recorded = record.get("adapter") if isinstance(record, dict) else None
        if recorded is not None and model.lora is not None:
            found = adapter_digest(open_model(model, options).path)
            if found != recorded:
                yield f"the adapter of the {role} model {model} has changed"


def _tokenizer(
    header: Mapping[str, Any], config: RainConfig, options: LoadOptions
) -> Iterator[str]:
    recorded = (header.get("run") or {}).get("tokenizer")  # older files have none
    path = open_model(config.reasoning, options).path
    if recorded is not None and recorded != tokenizer_digest(path):
        yield f"the tokenizer or the chat template of the reasoning model {path} has changed"


def _refuse_swapped(
    made: Mapping[str, Mapping[str, str] | None],
    found: Mapping[str, Mapping[str, str]],
    config: RainConfig,
) -> None:
    """Refuse the same three models in swapped roles: that is a mistake, not a new merge."""
    if any(digests is None for digests in made.values()):
        return
    same = [role for role in found if found[role] == made[role]]
    known = all(any(digests == other for other in made.values()) for digests in found.values())
    distinct = len({tuple(sorted(digests.items())) for digests in found.values()}) == len(found)
    if known and distinct and len(same) < len(found):
        swapped = [role for role in found if role not in same]
        names = " and ".join(f"{config.models[role]} as {role}" for role in swapped)
        raise RainError(
            f"{config.path}: {names}: {config.calibration} was made with these models in each "
            "other's roles; correct the roles (or delete that file to calibrate this way)"
        )


def _fingerprint(model: Any, options: LoadOptions) -> dict[str, str]:
    return fingerprint(open_model(model, options).path)


def _short(value: object) -> str:
    return json.dumps(value)
