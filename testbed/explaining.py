"""The pictures of docs/how-it-works.md, from a folder that `mergekit-rain demo` has filled.

python -m testbed.explaining FOLDER       # docs/img/how-drift.svg, docs/img/how-spectra.svg
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import yaml
from matplotlib.figure import Figure
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.summary import summarise
from rain_mergekit.demo.files import configuration
from rain_mergekit.evaluation.layerwise_drift import VerifyOptions
from rain_mergekit.evaluation.marker_distance import MarkerDistanceProfile
from rain_mergekit.evaluation.texts import Texts, read_texts
from rain_mergekit.evaluation.verify import measure_merge
from rain_mergekit.models.loading import LoadOptions, open_checkpoint
from rain_mergekit.report import spectra
from rain_mergekit.report.figures import COLOURS

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "img"
REASONING = ROOT / "rain_mergekit" / "trio" / "reasoning"
WITHOUT = "task-arithmetic-linear"
MODELS = {WITHOUT: "without a projection", "projection": "with it"}
KINDS = {"self_attn.q_proj": "attention (q, k, v)", "mlp.down_proj": "down"}


def drift_of(folder: Path) -> dict[str, MarkerDistanceProfile]:
    """Of both merges, on the held-out texts, at strength 1; the demo makes one of them only."""
    config = yaml.safe_load(configuration(WITHOUT, folder))
    merge = MergeConfiguration.model_validate(config)
    run_merge(merge, str(folder / WITHOUT), options=MergeOptions(quiet=True))
    load = LoadOptions()
    reasoning = open_checkpoint(str(REASONING), load)
    samples, _ = read_texts(reasoning, Texts(str(folder / "held-out.jsonl"), 64))
    return {
        name: measure_merge(
            reasoning, open_checkpoint(str(folder / name), load), samples, VerifyOptions(load)
        ).around
        for name in MODELS
    }


def draw_drift(found: dict[str, MarkerDistanceProfile]) -> Figure:
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    for axes, side in zip(figure.subplots(1, 2, sharey=True), ("open", "close"), strict=True):
        inside = (-0.5, 5.5) if side == "open" else (-5.5, 0.5)
        axes.axvspan(*inside, color="#9aa3aa", alpha=0.2, lw=0)
        axes.axvline(0, color="#59636b", lw=1, ls="--")
        for colour, (name, label) in zip((COLOURS[1], COLOURS[0]), MODELS.items(), strict=True):
            values = getattr(found[name], side)
            means = np.maximum([one.mean for one in values.values()], 1e-9)
            axes.plot(list(values), means, "o-", color=colour, ms=3.5, lw=1.4, label=label)
        axes.set(yscale="log", xlabel=f"tokens from the {side} marker")
    figure.axes[0].set_ylabel("KL of the next token, nats")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside upper center", ncols=2)
    return figure


def draw_spectra(path: Path) -> Figure:
    """Singular values of the protected features; dots are what the response rule protects."""
    file = CalibrationFile.open(str(path))
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    both: Any = figure.subplots(1, 2, sharey=True)
    for axes, (kind, title) in zip(both, KINDS.items(), strict=True):
        sites = [site for site in summarise(file).sites if site.kind == kind]
        for colour, site in zip(COLOURS, sites, strict=False):
            curve = spectra.singular(file, site, by_response=True)
            if curve is None:
                continue
            values = np.array(curve.values)
            axes.plot(curve.x, values, color=colour, lw=0.9, alpha=0.6)
            dots = np.where(curve.protected, values, np.nan)
            axes.plot(curve.x, dots, ".", color=colour, ms=5, label=f"layer {site.layer}")
        axes.set(xscale="log", yscale="log", xlabel="direction", title=f"input of {title}")
    both[0].set_ylabel("singular value / largest")
    both[0].legend(frameon=False, loc="lower left")
    return figure


def save(figure: Figure, name: str) -> None:
    """The same numbers give the same bytes; a white ground, as pages may be dark."""
    figure.patch.set_facecolor("white")
    with mpl.rc_context({"svg.hashsalt": "explaining", "svg.fonttype": "none"}):
        figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None, "Creator": None})


def main() -> None:
    folder = Path(sys.argv[1])
    save(draw_drift(drift_of(folder)), "how-drift")
    save(draw_spectra(folder / "trio.rain.safetensors"), "how-spectra")


if __name__ == "__main__":
    main()
