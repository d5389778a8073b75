"""How λ, rank and data change a merge of the shipped trio: the plots of docs/choosing.md.

python -m testbed.choosing measure    # minutes; goes on from testbed/results/choosing.json
python -m testbed.choosing draw       # docs/img/choosing-*.svg
"""

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import calibrate
from rain_mergekit.config.merge_config import read_config
from rain_mergekit.demo.files import ASKED
from rain_mergekit.demo.scoring import read_records, score
from rain_mergekit.evaluation.divergence_meter import DivergenceMeter
from rain_mergekit.evaluation.layerwise_drift import VerifyOptions
from rain_mergekit.merge_method.method import register
from rain_mergekit.models.generation import generate, load_model
from rain_mergekit.models.loading import LoadOptions, open_checkpoint
from rain_mergekit.models.tokenizer import load_tokenizer
from rain_mergekit.system.shipped_files import TRIO
from rain_mergekit.text.calibration_sets import load_reasoning

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "testbed" / "results" / "choosing.json"
IMAGES = ROOT / "docs" / "img"
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
SHARES = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999)
COUNTS = (2, 4, 8, 16, 32, 96)
MOST_TOKENS = 96


def plan() -> list[dict[str, Any]]:
    """Every point: strength, share and number of reasoning samples; defaults elsewhere."""
    default = {"strength": 1.0, "share": 0.99, "samples": 96}
    points = [{**default, "strength": value} for value in STRENGTHS]
    points += [{**default, "share": value} for value in SHARES]
    points += [{**default, "samples": value} for value in COUNTS]
    return list({json.dumps(point): point for point in points}.values())


class Bench:
    """The trio's reasoning model, its held-out texts and prompts, loaded once."""

    def __init__(self, folder: Path) -> None:
        register()
        self.folder = folder
        self.records = read_records(TRIO / "test.jsonl", ASKED)
        self.reasoning = open_checkpoint(str(TRIO / "reasoning"), LoadOptions())
        self.tokenizer = load_tokenizer(self.reasoning)
        held_out = folder / "held-out.jsonl"
        lines = [json.dumps({"prompt": r.prompt, "output": r.output}) for r in self.records]
        held_out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        texts = load_reasoning(held_out, self.tokenizer, keep_response=True).samples
        how = VerifyOptions(LoadOptions(), dtype=torch.float32)
        self.meter = DivergenceMeter.of(self.reasoning, texts, how)

    def measure(self, point: Mapping[str, Any]) -> dict[str, Any]:
        config = self.configure(point)
        calibration = config.calibration
        if not calibration.exists():
            calibrate(config, RunOptions(quiet=True))
        out = self.folder / "merged"
        run_merge(
            MergeConfiguration.model_validate(yaml.safe_load(config.text)),
            str(out),
            options=MergeOptions(quiet=True),
            config_source=config.text,
        )
        return {**point, **self.judge(out)}

    def configure(self, point: Mapping[str, Any]) -> Any:
        lines = (TRIO / "reasoning.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        data = self.folder / f"reasoning-{point['samples']}.jsonl"
        data.write_text("".join(lines[: point["samples"]]), encoding="utf-8")
        name = f"share-{point['share']}-samples-{point['samples']}.rain.safetensors"
        content = {
            "merge_method": "rain",
            "base_model": str(TRIO / "reasoning"),
            "models": [
                {"model": str(TRIO / role), "parameters": {"role": role}}
                for role in ("instruct", "pretrained")
            ],
            "parameters": {"calibration": str(self.folder / name), "lambda": point["strength"]},
            "dtype": "bfloat16",
            "rain": {
                "reasoning_data": str(data),
                "instruction_data": str(TRIO / "instruction.jsonl"),
                "fit": "projection",
                "rank_share": point["share"],
            },
        }
        path = self.folder / "config.yml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return read_config(path)

    def judge(self, folder: Path) -> dict[str, Any]:
        merged = open_checkpoint(str(folder), LoadOptions())
        model = load_model(merged, "cpu", torch.float32)
        prompts = [record.prompt for record in self.records]
        answers = generate(model, self.tokenizer, prompts, max_new_tokens=MOST_TOKENS)
        found = score(self.records, [answer.thought for answer in answers])
        return {
            "complete": found.complete,
            "plain": found.plain,
            "both": found.both,
            "followed": found.followed,
            "L_think": self.meter.drift(merged).think.mean,
        }


def measure() -> None:
    """Every point that is not in the results yet."""
    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for point in plan():
            if any(all(row[k] == v for k, v in point.items()) for row in found):
                continue
            found.append(bench.measure(point))
            print(found[-1], flush=True)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def draw() -> None:
    """One SVG for each of the three questions."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    panels: Sequence[tuple[str, str, str, bool]] = (
        ("strength", "lambda", "lambda", False),
        ("share", "rank", "1 - rank_share", True),
        ("samples", "data", "reasoning samples", True),
    )
    for key, name, label, logarithmic in panels:
        others = {"strength": 1.0, "share": 0.99, "samples": 96}
        others.pop(key)
        chosen = [row for row in rows if all(row[k] == v for k, v in others.items())]
        chosen.sort(key=lambda row: float(row[key]))
        place: Callable[[Any], float] = (
            (lambda row: 1 - row["share"]) if key == "share" else (lambda row: row[key])  # noqa: B023
        )
        picture(IMAGES / f"choosing-{name}.svg", chosen, place, label, logarithmic=logarithmic)


def picture(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    place: Callable[[Any], float],
    label: str,
    *,
    logarithmic: bool,
) -> None:
    """Percentages on the left, L_think on the right."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    at = [place(row) for row in rows]
    curves = (
        ("both", "right and constraint followed", "#0072b2"),
        ("plain", "right, without a constraint", "#009e73"),
        ("complete", "thinking complete", "#7f7f7f"),
    )
    for key, name, colour in curves:
        left.plot(at, [row[key] for row in rows], "o-", color=colour, ms=4, label=name)
    right.plot(at, [max(row["L_think"], 1e-7) for row in rows], "o-", color="#d55e00", ms=4)
    left.set(ylabel="percent of prompts", ylim=(-3, 103))
    right.set(ylabel="L_think (nats)", yscale="log")
    for axes in (left, right):
        _horizontal(axes, at, label, logarithmic=logarithmic)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8
    )
    with mpl.rc_context({"svg.hashsalt": "choosing", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def _horizontal(axes: Axes, at: Sequence[float], label: str, *, logarithmic: bool) -> None:
    axes.set(xlabel=label)
    if logarithmic:
        axes.set_xscale("log")
    axes.set_xticks(at, [f"{value:.3g}" for value in at])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    {"measure": measure, "draw": draw}[sys.argv[1]]()
