"""The calibration file: opened once, validated at once, its tensors read and checked by key."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import weakref
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from rain_mergekit.calibration_file.container import Entry, parse_json, read_header, read_tensor
from rain_mergekit.calibration_file.schema import (
    FORMAT,
    VERSION,
    ModelRecord,
    Plans,
    SitePlan,
    TensorPlan,
    parse_header,
)
from rain_mergekit.errors import RainError
from rain_mergekit.linalg.factors import Factors
from rain_mergekit.linalg.finite import finite
from rain_mergekit.system.untrusted_input import is_lfs_pointer


class CalibrationFile:
    """An open calibration file; safe to use from several threads.

    It stays open, so that a file replaced in the middle of a merge cannot mix two calibrations.
    Nothing but the header is read before a tensor is asked for.

    Attributes:
        path: the path it was opened by.
        header: the parsed header JSON.
        kind: the merge method that the file is for.
        gamma: how much of W_R - W_B is taken from the task vectors, 0 to 1.
        models: what is recorded of each of the three models, by role.
        sites: for each input site its width, its rank and the keys of its factors, by name.
        tensors: for each weight how it is merged, by the name that it has in the checkpoint.
        reads: how often each stored tensor was read from the disk, by key.
    """

    def __init__(
        self,
        path: str,
        file: BinaryIO,
        entries: Mapping[str, Entry],
        data_start: int,
        header: dict[str, Any],
        plans: Plans,
    ) -> None:
        """entries: where each tensor is stored, from byte `data_start` on; plans: of `header`."""
        self.path, self._file, self._entries, self._data_start = path, file, entries, data_start
        self._lock = threading.Lock()
        self._close = weakref.finalize(self, file.close)
        self.header, self.kind, self.gamma = header, plans.kind, plans.gamma
        self.models: Mapping[str, ModelRecord] = plans.models
        self.sites: Mapping[str, SitePlan] = plans.sites
        self.tensors: Mapping[str, TensorPlan] = plans.tensors
        self._digests = plans.digests
        self.reads: Counter[str] = Counter()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> CalibrationFile:
        """Open a file and check everything that needs no tensor data.

        Raises:
            RainError: there is no such file, or it is damaged, altered, or of a newer format.
        """
        name = os.fspath(path)
        try:
            if not stat.S_ISREG(Path(name).stat().st_mode):
                raise RainError("it is not a regular file")
            if is_lfs_pointer(Path(name)):
                raise RainError("it is a git-lfs pointer, not the file itself: run `git lfs pull`")
            file = Path(name).open("rb")  # noqa: SIM115 - stays open with the object
            try:
                metadata, entries, start = read_header(file, os.fstat(file.fileno()).st_size)
                return cls(name, file, entries, start, *_plans(metadata, entries))
            except BaseException:
                file.close()
                raise
        except FileNotFoundError:
            raise RainError(
                f"calibration file {name!r} does not exist: write it with "
                "`mergekit-rain calibrate CONFIG`, or correct `parameters.calibration`"
            ) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise RainError(f"cannot open calibration file {name!r}: {reason}") from None
        except RainError as error:
            raise RainError(f"calibration file {name!r} cannot be used: {error}") from None

    def keys(self) -> tuple[str, ...]:
        """The keys of all stored tensors."""
        return tuple(self._entries)

    def tensor(self, key: str) -> Tensor:
        """Read one stored tensor to the CPU, in its stored type, and compare its digest.

        Raises:
            RainError: there is no such key, or the content was altered.
        """
        entry = self._entries.get(key)
        if entry is None:
            raise RainError(f"calibration file {self.path!r} has no tensor {key!r}")
        try:
            with self._lock:
                tensor, digest = read_tensor(self._file, self._data_start, entry)
                self.reads[key] += 1
        except (OSError, ValueError, RainError) as error:
            raise RainError(
                f"calibration file {self.path!r}: cannot read tensor {key!r}: {error}"
            ) from None
        if digest != self._digests[key]:
            raise RainError(
                f"calibration file {self.path!r} was altered: the content of tensor {key!r} does "
                "not match its digest; calibrate again, or fetch the file again"
            )
        return tensor

    def factors(self, site: str) -> Factors:
        """U and V of one site, (d_in, r) in float32; (d_in, 0) at rank 0.

        Raises:
            RainError: they were altered, or hold NaN or infinite values.
        """
        plan = self.sites[site]
        if plan.u is None:
            return Factors.empty(plan.width)
        u = self._finite(plan.u)
        return Factors(u, u if plan.v in (None, plan.u) else self._finite(str(plan.v)))

    def change(self, plan: TensorPlan) -> tuple[Tensor, Tensor] | None:
        """A (d_out, r) and B (d_in, r) of a weight in float32; None if nothing is added to it.

        Of a weight that holds all experts, those of one expert after the other: see `plan.ranks`.
        """
        if plan.a is None or plan.b is None:
            return None
        return self._finite(plan.a), self._finite(plan.b)

    def scale(self, key: str | None) -> Tensor | None:
        """A row or column vector in float32; None stands for all ones."""
        return None if key is None else self._finite(key)

    def verify(self) -> None:
        """Read everything and compare all digests.

        Raises:
            RainError: a tensor was altered; the message names the first one.
        """
        for key in self._entries:
            self.tensor(key)

    def close(self) -> None:
        """Close the file; it is closed with the object otherwise."""
        self._close()

    def _finite(self, key: str) -> Tensor:
        tensor = self.tensor(key).to(torch.float32)
        if not finite(tensor):
            raise RainError(
                f"calibration file {self.path!r}: tensor {key!r} holds NaN or infinite values; "
                "calibrate again"
            )
        return tensor


def _plans(metadata: dict[str, Any], entries: Mapping[str, Entry]) -> tuple[dict[str, Any], Plans]:
    """Format, version and digest first: only then does the rest of the header mean anything."""
    if metadata.get("format") != FORMAT:
        raise RainError(f"not a calibration file (its metadata does not say format={FORMAT!r})")
    _require_known(metadata.get("format_version"))
    text = metadata.get("header")
    if not isinstance(text, str):
        raise RainError("its metadata has no text named header")
    if hashlib.sha256(text.encode(errors="replace")).hexdigest() != metadata.get("header_sha256"):
        raise RainError("its header was altered: the content does not match header_sha256")
    header = parse_json(text, "the header")
    return header, parse_header(header, entries)


def _require_known(version: object) -> None:
    if not isinstance(version, str) or not version.isdecimal() or not 0 < len(version) < 10:
        raise RainError(f"format_version must be a whole number, found {version!r:.40}")
    if int(version) > VERSION:
        raise RainError(
            f"it has format version {int(version)} and was written by a newer rain_mergekit; "
            f"this one reads version {VERSION}: upgrade with `pip install -U rain-mergekit`"
        )
    if int(version) < 1:
        raise RainError(f"there is no format version {int(version)}")
