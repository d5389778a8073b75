"""The header of a calibration file (versions 1 to 6): names, types, what must fit together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rain_mergekit.calibration_file.container import Entry
from rain_mergekit.calibration_file.header_fields import HeaderFields
from rain_mergekit.config.method_names import CALIBRATED, RAIN
from rain_mergekit.errors import RainError

FORMAT = "rain-calibration"
VERSION = 6
# The oldest version that can say what a file says: 2 added the factors A and B of a weight, 3 the
# merge method that the file is for, 4 the part of W_R - W_B that is taken from task vectors, 5
# factors of each expert in a weight that holds all of them, 6 a share of W_I - W_R beside factors.
_ADDED, _KIND, _GAMMA, _RANKS, _START = 2, 3, 4, 5, 6
ROLES = ("reasoning", "instruct", "pretrained")


@dataclass(frozen=True)
class ModelRecord:
    """One of the three models; a fingerprint of None was not recorded and is not checked."""

    reference: str
    revision: str | None
    fingerprint: Mapping[str, str] | None

    def differences(self, found: Mapping[str, str]) -> list[str]:
        """The recorded parts of the fingerprint that differ in the one that was found."""
        recorded = self.fingerprint or {}
        return [part for part, digest in recorded.items() if found.get(part) != digest]


@dataclass(frozen=True)
class SitePlan:
    """One input site: `width` d, `rank` r, and the keys of U and V (d, r); None, None at rank 0."""

    width: int
    rank: int
    kept_energy: float | None
    positions: int | None
    u: str | None
    v: str | None
    spectrum: str | None
    damping: str | None


@dataclass(frozen=True)
class TensorPlan:
    """One weight: its site (or one for each expert), shape, input axis, and scale vectors.

    tokens: its rows are tokens; a merge that aligns vocabularies may have more of them or fewer.
    a, b: keys of the factors (d_out, r) and (d_in, r) of a change that is added; a weight with
    one and without a site takes nothing else. ranks: of a weight that holds all experts, how many
    of the r columns are each expert's, in order. start: the share of W_I - W_R that is added; a
    weight with one is not projected.
    """

    site: str | tuple[str, ...] | None
    shape: tuple[int, ...]
    input_axis: int
    rows: str | None
    cols: str | None
    tokens: bool = False
    a: str | None = None
    b: str | None = None
    ranks: tuple[int, ...] = ()
    start: float = 0.0

    @property
    def projected(self) -> bool:
        """Whether the task vector, scaled and projected, is part of the change."""
        return self.site is not None or (self.a is None and not self.start)


@dataclass(frozen=True)
class Plans:
    """The parsed header."""

    kind: str
    models: Mapping[str, ModelRecord]
    sites: Mapping[str, SitePlan]
    tensors: Mapping[str, TensorPlan]
    digests: Mapping[str, str]
    gamma: float


def version_of(header: Mapping[str, Any]) -> int:
    """The format version that a file with this header needs."""
    entries = header.get("tensors")
    tensors = list(entries.values()) if isinstance(entries, dict) else []
    for field, version in (("start", _START), ("ranks", _RANKS)):
        if any(isinstance(t, dict) and t.get(field) for t in tensors):
            return version
    if header.get("gamma"):
        return _GAMMA
    if header.get("kind", RAIN) != RAIN:
        return _KIND
    return _ADDED if any(isinstance(t, dict) and t.get("a") for t in tensors) else 1


def parse_header(header: Mapping[str, Any], entries: Mapping[str, Entry]) -> Plans:
    """Check the header against itself and the stored tensors; RainError names the field."""
    root = HeaderFields(header, "", entries)
    digests = root.table("tensor_sha256")
    if set(digests) != set(entries):
        odd = sorted(set(digests) ^ set(entries))
        raise RainError(f"tensor_sha256 and the stored tensors differ: {odd[:3]!r}")
    kind = root.optional_text("kind") or RAIN
    if kind not in CALIBRATED:
        root.fail("kind", f"one of {', '.join(CALIBRATED)}", kind)
    models = {role: _model(root.table("models").table(role)) for role in ROLES}
    sites = {name: _site(fields) for name, fields in root.table("sites").tables()}
    tensors = {name: _tensor(fields, sites) for name, fields in root.table("tensors").tables()}
    _check_remarks(root)
    gamma = root.optional_number("gamma") or 0.0
    if not 0 <= gamma <= 1:
        root.fail("gamma", "a number from 0 to 1", gamma)
    return Plans(kind, models, sites, tensors, {key: digests.text(key) for key in digests}, gamma)


def _model(fields: HeaderFields) -> ModelRecord:
    digests = None
    if fields.get("fingerprint") is not None:
        table = fields.table("fingerprint")
        digests = {name: table.text(name) for name in table}
    return ModelRecord(fields.text("reference"), fields.optional_text("revision"), digests)


def _site(fields: HeaderFields) -> SitePlan:
    width = fields.natural("width", 1)
    rank = fields.natural("rank", 0, width)
    u, v = fields.key("u", (width, rank)), fields.key("v", (width, rank))
    if (u is None) != (rank == 0):
        fields.fail("u", "null at rank 0 and the key of the basis otherwise", u)
    if u is None and v is not None:
        fields.fail("v", "null where u is null", v)
    return SitePlan(
        width=width,
        rank=rank,
        kept_energy=fields.optional_number("kept_energy"),
        positions=None if fields.get("positions") is None else fields.natural("positions", 0),
        u=u,
        v=v,
        spectrum=fields.key("spectrum", (None,)),
        damping=fields.key("damping", (rank,)),
    )


def _tensor(fields: HeaderFields, sites: Mapping[str, SitePlan]) -> TensorPlan:
    shape = fields.get("shape")
    if not isinstance(shape, list) or len(shape) not in (2, 3):
        fields.fail("shape", "a list of 2 or 3 sizes", shape)
    if not all(type(size) is int and size > 0 for size in shape):
        fields.fail("shape", "a list of sizes above 0", shape)
    axis = fields.get("input_axis")
    if type(axis) is not int or axis not in (-1, -2):
        fields.fail("input_axis", "-1 or -2", axis)
    d_in, d_out = shape[axis], shape[-3 - axis]
    site = fields.get("site")
    if isinstance(site, list):
        if len(shape) != 3 or len(site) != shape[0]:
            fields.fail("site", f"one site, or a list of one for each of {shape[0]} experts", site)
        site = tuple(site)
    for name in site if isinstance(site, tuple) else (site,):
        if name is not None or isinstance(site, tuple):
            _require_width(fields, sites.get(name) if isinstance(name, str) else None, name, d_in)
    rows, cols = fields.key("rows", (d_out,)), fields.key("cols", (d_in,))
    tokens = fields.optional_flag("tokens")
    if tokens and (len(shape) != 2 or axis != -1):
        fields.fail("tokens", "true only for a weight with a row for each token", tokens)
    a, b = _change(fields, d_out, d_in)
    ranks = _ranks(fields, shape, a)
    start = _start(fields, matrix=site is None and len(shape) == 2 and not tokens)
    return TensorPlan(site, tuple(shape), axis, rows, cols, tokens, a, b, ranks, start)


def _start(fields: HeaderFields, *, matrix: bool) -> float:
    start = fields.optional_number("start") or 0.0
    if start and not matrix:
        fields.fail("start", "left out, but for a matrix without a site or tokens", start)
    if not 0 <= start <= 1:
        fields.fail("start", "a number from 0 to 1", start)
    return start


def _change(fields: HeaderFields, d_out: int, d_in: int) -> tuple[str | None, str | None]:
    a, b = fields.key("a", (d_out, None)), fields.key("b", (d_in, None))
    if (a is None) != (b is None):
        fields.fail("a", "given together with b", a or b)
    if a is not None and b is not None and fields.entries[a].shape[1] != fields.entries[b].shape[1]:
        fields.fail("b", f"a tensor of as many columns as {a}", list(fields.entries[b].shape))
    return a, b


def _ranks(fields: HeaderFields, shape: list[int], a: str | None) -> tuple[int, ...]:
    """How the columns of a and b are divided among the experts of a weight that holds them all."""
    if a is None or len(shape) == 2:
        if fields.get("ranks") is not None:
            fields.fail("ranks", "left out, but for experts with a and b", fields.get("ranks"))
        return ()
    ranks, columns = fields.naturals("ranks"), fields.entries[a].shape[1]
    if len(ranks) != shape[0] or sum(ranks) != columns:
        fields.fail("ranks", f"a list of {shape[0]} ranks, {columns} together", list(ranks))
    return ranks


def _require_width(fields: HeaderFields, plan: SitePlan | None, name: object, width: int) -> None:
    if plan is None:
        fields.fail("site", "the name of a site", name)
    elif plan.width != width:
        fields.fail("site", f"a site of width {width}, the input size", f"{name} ({plan.width})")


def _check_remarks(root: HeaderFields) -> None:
    """Sections for people and reports: types only, and each key must be a stored tensor."""
    root.optional_text("created_by")
    for name in ("data", "settings", "run"):
        if root.get(name) is not None:
            root.table(name)
    for name in ("layers", "warnings"):
        if not isinstance(root.get(name) or [], list):
            root.fail(name, "a list", root.get(name))
    for index, layer in enumerate(root.get("layers") or []):
        fields = HeaderFields(layer, f"layers.{index}", root.entries)
        fields.text("name")
        for key in (stats := fields.table("stats")):
            if stats.text(key) not in root.entries:
                stats.fail(key, "the key of a stored tensor", stats.get(key))
    _check_streams(root)
    if not all(isinstance(line, str) for line in root.get("warnings") or []):
        root.fail("warnings", "a list of texts", root.get("warnings"))


def _check_streams(root: HeaderFields) -> None:
    """Errors of stream matching by layer, and how each change was fitted: numbers by name."""
    if root.get("streams") is not None:
        section = root.table("streams")
        if not isinstance(section.get("layers"), list):
            section.fail("layers", "a list", section.get("layers"))
        for index, layer in enumerate(section.get("layers")):
            fields = HeaderFields(layer, f"streams.layers.{index}", root.entries)
            fields.text("name")
            for kind in ("fitted", "held_out"):
                _require_numbers(fields.table(kind))
            if fields.get("experts") is not None:
                for _, found in fields.table("experts").tables():
                    _check_experts(found)
    for _, tensor in root.table("tensors").tables():
        if tensor.get("fit") is not None:
            fit = tensor.table("fit")
            _require_numbers(fit)
            _require_numbers(fit, "rank", "explained", "fitted", "wanted")


def _check_experts(fields: HeaderFields) -> None:
    """Tokens of each expert, and the numbers of those that stay as they are."""
    fields.naturals("tokens")
    fields.naturals("few")
    worse = fields.table("worse")
    for name in worse:
        worse.naturals(name)


def _require_numbers(fields: HeaderFields, *names: str) -> None:
    for name in names or tuple(fields):
        if fields.optional_number(name) is None:
            fields.fail(name, "a finite number", fields.get(name))
