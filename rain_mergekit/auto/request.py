"""What `mergekit-rain auto` is asked for, kept beside the result so that it can be continued."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rain_mergekit.errors import RainError
from rain_mergekit.publish.layout import REQUEST
from rain_mergekit.system.atomic_file import replacing
from rain_mergekit.system.untrusted_input import read_regular


@dataclass(frozen=True)
class Request:
    """The models as they were named, and what decides the result besides them.

    markers: pairs, empty where they are found out; blocks: as in the settings. The sets are paths,
    None for those that come with the package; prompts: files to which the reasoning model shall
    write its own set.
    """

    models: tuple[str, ...]
    fit: str
    strength: float
    markers: tuple[tuple[str, str], ...] = ()
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    reasoning_data: str | None = None
    instruction_data: str | None = None
    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 4096
    seed: int = 0
    blocks: str = "required"


def continued(out: Path, request: Request) -> bool:
    """Whether `out` holds the beginning of this request.

    RainError if it holds that of another one, or a model that was made otherwise.
    """
    try:
        found: Any = json.loads(read_regular(out / REQUEST))
    except FileNotFoundError:
        if (out / "config.json").exists():
            raise RainError(
                f"{out}: holds a model that `mergekit-rain auto` has not made; name another folder"
            ) from None
        return False
    except (OSError, ValueError, RecursionError):
        found = None
    wanted = json.loads(json.dumps(asdict(request)))
    if found != wanted:
        known = found if isinstance(found, dict) else {}
        other = [name for name, value in wanted.items() if known.get(name) != value]
        raise RainError(
            f"{out}: was begun with other {', '.join(other)}; name another folder, or remove this "
            "one to begin anew"
        )
    return True


def keep(out: Path, request: Request) -> None:
    """Write it, and the folder; RainError if it cannot be written."""
    path = out / REQUEST
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RainError(
            f"{out}: cannot be written ({error.strerror or error}); name another output folder"
        ) from None
    with replacing(path) as file:
        file.write(json.dumps(asdict(request), indent=1).encode() + b"\n")
