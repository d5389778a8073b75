"""Prompts from a data set of the hub, by its name; through the hub's own client and its cache."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from rain_mergekit.errors import RainError
from rain_mergekit.instructions.hub_files import FORM, HubSet, chosen_files
from rain_mergekit.instructions.prompts import Asked, parse_prompt
from rain_mergekit.models.source import HTTP_ERROR
from rain_mergekit.system.json_fields import JsonFields
from rain_mergekit.system.json_samples import LIMIT, JsonObject, read_samples
from rain_mergekit.system.untrusted_input import MIB, first_line, read_regular

_CARD = "README.md"
# The first of them that is there holds the prompt, where no column is named.
_PROMPTS = ("prompt", "question", "problem", "instruction", "query")
_OURS = ("answer", "choices", "instruction_id_list", "kwargs", "related_prompt_list", "kind")


def read_hub_prompts(text: str, cache_dir: str | None = None) -> list[Asked]:
    """The prompts that `hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT[:COLUMN]]` names.

    Only the card and the files of the split are fetched; without network, or offline, what an
    earlier run has fetched is used. Beside the prompt the columns of our own layout are read.
    cache_dir: where downloads are kept; None: the hub client's own. Raises RainError if there is no
    such data set, split or column, or the hub cannot be asked.
    """
    wanted = HubSet.parse(text)
    with _told(wanted):
        files, whole = _files(wanted, cache_dir)
        card = _fetch(wanted, _CARD, cache_dir) if _CARD in files else None
    about = read_regular(card).decode("utf-8", "replace") if card is not None else ""
    try:
        chosen = chosen_files(files, about, wanted)
    except RainError as error:
        known = "" if whole else "; the hub cannot be asked now, and earlier runs fetched no more"
        raise RainError(f"{error}{known}") from None
    with _told(wanted):
        paths = [_fetch(wanted, file, cache_dir) for file in chosen]
    return [asked for path in paths for asked in _read(path, wanted)]


def _files(wanted: HubSet, cache_dir: str | None) -> tuple[list[str], bool]:
    """What the repository holds; or what the cache has of it, and False, without network."""
    try:
        found = HfApi().dataset_info(wanted.name, revision=wanted.revision)
        return [file.rfilename for file in found.siblings or ()], True
    except HfHubHTTPError:
        raise
    except (HTTP_ERROR, ConnectionError):
        folder = snapshot_download(
            wanted.name,
            repo_type="dataset",
            revision=wanted.revision,
            cache_dir=cache_dir,
            local_files_only=True,
        )
        place = Path(folder)
        return [p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()], False


def _fetch(wanted: HubSet, file: str, cache_dir: str | None) -> Path:
    path = hf_hub_download(
        wanted.name, file, repo_type="dataset", revision=wanted.revision, cache_dir=cache_dir
    )
    return Path(path)


@contextmanager
def _told(wanted: HubSet) -> Iterator[None]:
    """What the hub's client raises, as one RainError."""
    try:
        yield
    except HFValidationError:
        raise RainError(f"{wanted}: is not a data set of the hub; expected {FORM}") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None) or 0
        why = (
            f"answers with status {status}; try again later"
            if status >= 500 or status == 429
            else "shows no such data set or revision: correct the name, or log in with `hf auth "
            "login` for a private or gated one"
        )
        raise RainError(f"{wanted}: the hub {why} ({first_line(error)})") from None
    except (HTTP_ERROR, OSError, ValueError, RuntimeError) as error:
        raise RainError(
            f"{wanted}: the hub cannot be asked (no network, or offline mode), and nothing of this "
            f"data set was fetched before; give a file ({first_line(error)})"
        ) from None


def _read(path: Path, wanted: HubSet) -> Iterator[Asked]:
    def parse(source: str, value: object) -> Asked:
        return _asked(source, value, wanted.column)

    if path.name.endswith(".parquet"):
        yield from _parquet(path, parse, wanted.column)
    else:
        yield from read_samples(path, parse)[1]


def _parquet(
    path: Path, parse: Callable[[str, object], Asked], column: str | None
) -> Iterator[Asked]:
    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError:
        raise RainError(
            f"{path}: reading parquet needs pyarrow, which is not installed: pip install "
            "'rain-mergekit[parquet]'"
        ) from None
    try:
        if os.path.getsize(path) > LIMIT:
            raise RainError(f"{path}: larger than {LIMIT // MIB} MiB; give a file of your own")
        file = parquet.ParquetFile(path)
        names = [n for n in file.schema_arrow.names if n in (column, *_PROMPTS, *_OURS)]
        rows = file.read(names or None).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise RainError(f"{path}: cannot be read as parquet: {first_line(error)}") from None
    for number, row in enumerate(rows, start=1):
        # As if it had been read from JSON: nested objects remember their fields too.
        text = json.dumps(row, default=str)
        yield parse(f"{path}:{number}", json.loads(text, object_pairs_hook=JsonObject))


def _asked(source: str, value: object, column: str | None) -> Asked:
    row = JsonFields(source, value).raw
    name = column or next((one for one in _PROMPTS if row.get(one) is not None), None)
    if name is None or row.get(name) is None:
        wanted = f"no column {column!r}" if column else f"none of the columns {', '.join(_PROMPTS)}"
        raise RainError(
            f"{source}: has {wanted}, but {', '.join(sorted(row))}; name the column of the prompts:"
            f" {FORM}"
        )
    kept: dict[str, Any] = {key: row[key] for key in _OURS if row.get(key) is not None}
    if not isinstance(kept.get("kind", ""), str):
        del kept["kind"]
    fields = JsonObject([("prompt", _turn(row[name])), *kept.items()])
    return parse_prompt(JsonFields(source, fields))


def _turn(value: object) -> object:
    """The user's text where the column holds a conversation that begins with it."""
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, dict) and first.get("role") == "user":
        return first.get("content")
    return value
