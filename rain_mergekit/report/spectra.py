"""The spectra as plain numbers to draw; no side effects except reading the file."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.site_names import Site, locate

_POINTS = 160


@dataclass(frozen=True)
class Curve:
    """A falling curve of one site: y over direction numbers x (from 1), thinned for drawing.

    values and protected have one entry for each x; `cut` is the last protected direction's place
    where the protected ones come first, else None.
    """

    layer: int | None
    x: tuple[int, ...]
    values: tuple[float, ...]
    protected: tuple[bool, ...]
    cut: tuple[int, float] | None


def singular(file: CalibrationFile, site: Site, *, by_response: bool) -> Curve | None:
    """Singular values relative to the largest; None where the file has no spectrum."""
    energies = _vector(file, file.sites[site.name].spectrum)
    if energies is None:
        return None
    response = _response(file, site)
    protected = torch.zeros(energies.numel(), dtype=torch.bool)
    if by_response and response is not None and response.numel() == energies.numel():
        protected[response.argsort(descending=True, stable=True)[: site.rank]] = True
    else:
        protected[: site.rank] = True
    return _curve(site, (energies / energies.max()).sqrt(), protected)


def response(file: CalibrationFile, site: Site, *, by_response: bool) -> Curve | None:
    """Response energies relative to the largest, largest first; None where there are none."""
    energies = _response(file, site)
    if energies is None:
        return None
    order = energies.argsort(descending=True, stable=True)
    protected = torch.zeros(energies.numel(), dtype=torch.bool)
    protected[: site.rank] = True
    if not by_response:
        protected = protected[order]
    return _curve(site, energies[order] / energies.max(), protected)


def _response(file: CalibrationFile, site: Site) -> Tensor | None:
    key = file.header["sites"][site.name].get("response_energy")
    return _vector(file, key if isinstance(key, str) and key in file.keys() else None)  # noqa: SIM118


def _vector(file: CalibrationFile, key: str | None) -> Tensor | None:
    """A stored vector of numbers of 0 or more, not all 0."""
    if key is None:
        return None
    values = file.tensor(key).double()
    usable = values.dim() == 1 and bool(torch.isfinite(values).all()) and bool((values >= 0).all())
    return values if usable and values.numel() and float(values.max()) > 0 else None


def _curve(site: Site, values: Tensor, protected: Tensor) -> Curve:
    places = _thinned(values.numel(), site.rank)
    first = bool(protected[: site.rank].all()) and 0 < site.rank <= values.numel()
    return Curve(
        layer=locate(site.name)[0],
        x=tuple(place + 1 for place in places),
        values=tuple(float(values[place]) for place in places),
        protected=tuple(bool(protected[place]) for place in places),
        cut=(site.rank, float(values[site.rank - 1])) if first else None,
    )


def _thinned(count: int, rank: int) -> list[int]:
    """All places of a short curve, else evenly spaced ones on a logarithmic scale, with the cut."""
    if count <= _POINTS:
        return list(range(count))
    steps = {round((count - 1) ** (i / (_POINTS - 1))) for i in range(_POINTS)}
    return sorted({0, *steps, *({rank - 1} if 0 < rank <= count else ())})
