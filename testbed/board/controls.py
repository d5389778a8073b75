"""Edited copies of a calibration file: other directions, other heads, or only the same size."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.writer import write_calibration
from rain_mergekit.models.head_layout import HeadLayout

SEED = 0
STEEPNESS = 10.0
Tensors = dict[str, Tensor]
Header = dict[str, Any]


def random_basis(width: int, rank: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns (width x rank, float32) of a uniformly random subspace."""
    drawn = torch.randn(width, rank, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(drawn).Q.to(torch.float32)
    return basis


def shuffled(alphas: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """The same coefficients, dealt out anew over all heads of all layers."""
    values = torch.cat(alphas)
    values = values[torch.randperm(values.numel(), generator=generator)]
    return list(torch.split(values, [alpha.numel() for alpha in alphas]))


def sigmoid_weights(values: Tensor, threshold: float) -> Tensor:
    """w_i = sigmoid(10 (s_i/s_1 - t) / t) for eigenvalues s_i², largest first."""
    ratios = (values / values.max()).sqrt()
    return torch.sigmoid(STEEPNESS * (ratios - threshold) / threshold)


def shrinkage(delta: Tensor, u: Tensor | None, v: Tensor | None) -> float:
    """‖Δ(I - UVᵀ)‖ / ‖Δ‖, Frobenius."""
    if u is None or v is None or not delta.any():
        return 1.0
    return float((delta - (delta @ u) @ v.T).norm() / delta.norm())


def edit_random(header: Header, tensors: Tensors, trio: Path) -> None:
    """Another subspace of the same rank at each site, projected orthogonally."""
    del trio
    generator = torch.Generator().manual_seed(SEED)
    for site in header["sites"].values():
        if site["u"] is not None:
            tensors[site["u"]] = random_basis(site["width"], site["rank"], generator)
            site["v"] = None


def edit_shrunk(header: Header, tensors: Tensors, trio: Path) -> None:
    """No projection, but each matrix of the task vector as small as the projected one."""
    tuned, origin = (_weights(trio / role) for role in ("instruct", "pretrained"))
    for name, plan in header["tensors"].items():
        site, delta = header["sites"][plan["site"]], tuned[name] - origin[name]
        u = tensors.get(str(site["u"]))
        factor = shrinkage(delta, u, u if site["v"] is None else tensors[site["v"]])
        plan["site"], plan["rows"] = None, f"shrunk.{name}"
        tensors[plan["rows"]] = torch.full((plan["shape"][0],), factor)
    header["sites"] = {}


def edit_unprojected(header: Header, tensors: Tensors, trio: Path) -> None:
    """Coefficients only."""
    del tensors, trio
    for plan in header["tensors"].values():
        plan["site"] = None
    header["sites"] = {}


def edit_shuffled(header: Header, tensors: Tensors, trio: Path) -> None:
    """Every head gets the coefficient of another one."""
    generator = torch.Generator().manual_seed(SEED)
    del trio
    keys = [layer["stats"]["alpha"] for layer in header["layers"]]
    dealt = shuffled([tensors[key] for key in keys], generator)
    for layer, key, alpha in zip(header["layers"], keys, dealt, strict=True):
        tensors[key] = alpha
        rescale(header, tensors, HeadLayout(**layer["heads"]), layer["name"], alpha)


def rescale(
    header: Header, tensors: Tensors, layout: HeadLayout, layer: str, alpha: Tensor
) -> None:
    """Overwrite the scale vectors of one layer with those of other coefficients."""
    for name, plan in header["tensors"].items():
        if not name.startswith(f"{layer}."):
            continue
        module = name.removeprefix(f"{layer}.").removesuffix(".weight")
        scale = layout.scales(module, alpha, (plan["shape"][0], plan["shape"][1]))
        for axis, vector in (("rows", scale.rows), ("cols", scale.cols)):
            if vector is not None:
                tensors[plan[axis]] = vector.to(torch.float32)


def soften_all(threshold: float) -> Callable[[Header, Tensors, Path], None]:
    """Graduated protection of every direction that the features span."""

    def edit(header: Header, tensors: Tensors, trio: Path) -> None:
        del trio
        for name, site in header["sites"].items():
            weights = sigmoid_weights(tensors[site["spectrum"]], threshold)[: site["rank"]]
            site["v"] = f"soft.{name}"
            tensors[site["v"]] = (tensors[site["u"]] * weights).to(torch.float32)

    return edit


EDITS: Mapping[str, Callable[[Header, Tensors, Path], None]] = {
    "random subspace": edit_random,
    "shrunk": edit_shrunk,
    "no projection": edit_unprojected,
    "shuffled": edit_shuffled,
    "sigmoid 0.1": soften_all(0.1),
    "sigmoid 0.01": soften_all(0.01),
}


def edited(source: Path, target: Path, edit: str, trio: Path) -> Path:
    """Write an edited copy; what nothing refers to any more is left out."""
    file = CalibrationFile.open(source)
    header, tensors = deepcopy(file.header), {key: file.tensor(key) for key in file.keys()}  # noqa: SIM118
    file.close()
    EDITS[edit](header, tensors, trio)
    write_calibration(target, header, {k: t for k, t in tensors.items() if k in _named(header)})
    return target


def _named(header: Any) -> set[str]:
    """Every text in the header's sites, tensors and layers: keys are among them."""
    if isinstance(header, str):
        return {header}
    if not isinstance(header, (dict, list)):
        return set()
    items = header.values() if isinstance(header, dict) else header
    return set().union(*(_named(item) for item in items))


def _weights(folder: Path) -> Tensors:
    return {
        name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()
    }
