"""The measurement of `verify --card`, kept in the merged model's folder for the model card."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rain_mergekit.evaluation.divergence import Drift
from rain_mergekit.models.fingerprint import fingerprint
from rain_mergekit.system.atomic_file import replacing
from rain_mergekit.system.untrusted_input import read_regular, within

NAME = "rain_verification.json"


@dataclass(frozen=True)
class VerificationRecord:
    """Mean divergence by place in nats, on this many samples of the set of that name."""

    think: float
    content: float
    rest: float
    samples: int
    data: str
    sha256: str
    verdict: str


def save(folder: str | os.PathLike[str], drift: Drift, data: str, sha256: str) -> None:
    """Write what was measured beside the weights that it was measured on; RainError if it fails.

    Of `data` only the file's name is kept.
    """
    content = {
        "weights": fingerprint(os.fspath(folder))["weights"],
        "L_think": drift.think.mean,
        "L_mid": drift.content.mean,
        "L_rest": drift.rest.mean,
        "samples": drift.samples,
        "data": os.path.basename(data),
        "data_sha256": sha256,
        "verdict": drift.verdict,
    }
    with replacing(within(folder, NAME)) as out:
        out.write(json.dumps(content, indent=1).encode() + b"\n")


def load(folder: str | os.PathLike[str]) -> VerificationRecord | None:
    """What was measured on the weights that are in the folder now, or None.

    RainError if there is a measurement and the weights cannot be read.
    """
    try:
        content: Any = json.loads(read_regular(Path(folder, NAME)))
        found = VerificationRecord(
            think=float(content["L_think"]),
            content=float(content["L_mid"]),
            rest=float(content["L_rest"]),
            samples=int(content["samples"]),
            data=str(content["data"]),
            sha256=str(content["data_sha256"]),
            verdict=str(content["verdict"]),
        )
        weights = content["weights"]
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, RecursionError):
        return None
    # Otherwise the record belongs to an earlier merge.
    return found if weights == fingerprint(os.fspath(folder))["weights"] else None
