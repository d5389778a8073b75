"""A merged model on the hub: what goes there, and how. The hub's own client keeps the token."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.writer import write_calibration
from rain_mergekit.config.merge_config import RainConfig, read_config
from rain_mergekit.errors import RainError
from rain_mergekit.evaluation.verification_record import NAME as MEASURED
from rain_mergekit.models.side_files import side_files
from rain_mergekit.models.source import HTTP_ERROR
from rain_mergekit.models.weight_files import INDEX_FILES, weight_files
from rain_mergekit.publish.layout import (
    CALIBRATION,
    CARD,
    CONFIG,
    FOLDER,
    HELD_OUT,
    INSTRUCTION,
    MERGE_CONFIG,
    REASONING,
    RECORD,
    REPORT,
)
from rain_mergekit.publish.record import (
    Tick,
    make_record,
    public_header,
    read_record,
    tensor_digests,
    write_record,
)
from rain_mergekit.report.model_card import write_card
from rain_mergekit.report.public_names import without_local_paths
from rain_mergekit.system.json_samples import file_digest
from rain_mergekit.system.untrusted_input import first_line, read_regular, within

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HARMLESS = (".gitattributes", CARD)


@dataclass(frozen=True)
class Upload:
    """Files by their path in the repository, and the message of the commit."""

    files: Mapping[str, Path]
    message: str

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(path.stat().st_size for path in self.files.values())


def prepare(
    folder: Path, place: Path, command: str, *, with_data: bool, tick: Tick = lambda _bytes: None
) -> Upload:
    """Complete the folder of a merge (record, card), and gather what is to be uploaded.

    place: an empty folder for what is rewritten: no path of this machine goes to the hub.
    with_data: the calibration sets too, which may be private. `tick` is told of bytes that were
    read of the weights, where no record of them is there. Raises RainError if the folder is no
    merge of rain, or its calibration file is not there.
    """
    config = read_config(folder / MERGE_CONFIG)
    if not weight_files(folder) or not (folder / "config.json").exists():
        raise RainError(f"{folder}: holds no weights; merge into it first")
    write_card(folder)
    published = place / "calibration.rain.safetensors"
    file = CalibrationFile.open(config.calibration)
    try:
        keys = {key: lambda key=key: file.tensor(key) for key in file.keys()}  # noqa: SIM118
        write_calibration(published, public_header(file.header), keys)
    finally:
        file.close()
    if not (folder / RECORD).exists():
        tensors = tensor_digests(folder, tick)
        write_record(folder, make_record(config, {}, (command,), tensors))
    found = read_record(folder)
    write_record(place, replace(found, calibration=file_digest(published) or ""))
    names = [path.name for path in weight_files(folder)]
    names += ["config.json", *INDEX_FILES, MEASURED, *side_files(folder)]
    names += [CARD, *((REASONING, HELD_OUT, INSTRUCTION) if with_data else ())]
    files = {name: within(folder, name) for name in names if (folder / name).is_file()}
    files |= {CALIBRATION: published, RECORD: place / RECORD}
    for name in (MERGE_CONFIG, CONFIG, REPORT):
        if (folder / name).is_file():
            files[name] = _rewritten(folder, name, place, config)
    return Upload(dict(sorted(files.items())), f"Merged with {command.split(maxsplit=1)[0]}")


def _rewritten(folder: Path, name: str, place: Path, config: RainConfig) -> Path:
    """A YAML or page with public names, and files of the folder by their place in it."""
    text = read_regular(folder / name).decode("utf-8")
    moved = {str(config.calibration): CALIBRATION}
    for path in (config.settings.reasoning_data, config.settings.instruction_data):
        if path is not None:
            moved[path] = f"{FOLDER}/{Path(path).name}"
    moved |= {f"{folder.resolve()}/": "", str(folder.resolve()): folder.name}
    for path, public in moved.items():
        text = text.replace(path, public).replace(escape(path), public)
    goal = place / name.replace("/", "-")
    goal.write_text(without_local_paths(text, config), encoding="utf-8")
    return goal


def send(upload: Upload, name: str, *, public: bool) -> str:
    """Create the repository, private unless `public`, and commit all files at once.

    Returns the address. Raises RainError if the name is none, nobody is logged in, the hub says no,
    or there is another model of that name.
    """
    if not _NAME.fullmatch(name):
        raise RainError(f"{name}: is not a name on the hub, expected owner/name")
    api = HfApi()
    with told(name):
        _refuse_foreign(api, name, public=public)
        url = str(api.create_repo(name, private=not public, exist_ok=True))
        operations = [
            CommitOperationAdd(path_in_repo=goal, path_or_fileobj=str(path))
            for goal, path in upload.files.items()
        ]
        api.create_commit(name, operations, commit_message=upload.message)
    return url


def _refuse_foreign(api: HfApi, name: str, *, public: bool) -> None:
    """Somebody's other model is not overwritten, and nothing becomes public unasked."""
    try:
        found = api.model_info(name)
    except RepositoryNotFoundError:
        return
    there = {file.rfilename for file in found.siblings or ()}
    if RECORD not in there and there - set(_HARMLESS):
        raise RainError(
            f"{name}: is on the hub already and was not put there by `mergekit-rain push`; name "
            "another one"
        )
    if found.private is False and not public:
        raise RainError(f"{name}: is public on the hub; add --public if that is what you want")


@contextmanager
def told(name: str) -> Iterator[None]:
    """The hub's answers as one RainError; the token is in none of them."""
    try:
        yield
    except LocalTokenNotFoundError:
        raise RainError(f"{name}: you are not logged in to the hub: run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise RainError(
            f"{name}: the hub has no such model, or does not show it to you: log in with `hf auth "
            "login`, as somebody who may"
        ) from None
    except HFValidationError as error:
        raise RainError(f"{name}: is not a name on the hub: {first_line(error)}") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise RainError(
                f"{name}: the hub refuses this (status {status}): log in with `hf auth login`, "
                "with a token that may write there"
            ) from None
        raise RainError(f"{name}: the hub answers with status {status}; try again later") from None
    except (HTTP_ERROR, OSError, RuntimeError) as error:
        cause = first_line(error.__cause__ or error)
        raise RainError(
            f"{name}: the hub cannot be reached: {cause}; run the same command again"
        ) from None
