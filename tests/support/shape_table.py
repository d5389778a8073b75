"""The table of docs/large-models.md; run as a script it writes it there."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from shapes import PUBLISHED, write_shape

from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.shape_plan import plan_outline
from rain_mergekit.calibration.stream_shape import StreamShape
from rain_mergekit.models.outline import ModelOutline, outline_of

PAGE = Path(__file__).parents[2] / "docs" / "large-models.md"
BEGIN, END = "<!-- shapes: begin -->\n", "<!-- shapes: end -->\n"
NAMES = {
    "llama-70b": "70B, dense (Llama 3)",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "qwen3-235b-a22b": "Qwen3-235B-A22B",
    "deepseek-v3": "DeepSeek-V3, in bfloat16",
}
COLUMNS = "model | weights, for one token | rank, of at most | file | memory | work folder"
HEAD = [
    f"| {COLUMNS} | to read | operations |",
    "|---|---:|---:|---:|---:|---:|---:|---:|",
]
GIB, BILLION, PETA = 1024**3, 1e9, 1e15


def outlines() -> dict[str, ModelOutline]:
    """All shapes, built without weights."""
    with tempfile.TemporaryDirectory() as folder:
        return {name: outline_of(str(write_shape(Path(folder), name))) for name in PUBLISHED}


def table(found: Mapping[str, ModelOutline]) -> str:
    """All lines of the table."""
    return "\n".join([*HEAD, *(_row(NAMES[name], found[name]) for name in NAMES)]) + "\n"


def _row(name: str, outline: ModelOutline) -> str:
    plan = plan_outline(outline, {}, RunOptions(dtype=torch.bfloat16))
    active = sum(count * layer.active for layer, count in StreamShape.of(outline).layers)
    weights = f"{outline.parameters / BILLION:.0f} and {active / BILLION:.0f} billion"
    assert plan.file is not None
    sizes = (plan.file_bytes, plan.peak, plan.work_disk, plan.read_bytes)
    gibibytes = " | ".join(f"{size / GIB:,.0f} GiB" for size in sizes)
    work = (plan.forward_flops + plan.statistics_flops) / PETA
    return (
        f"| {name} | {weights} | {plan.rank:,} of {plan.file.widest:,} | {gibibytes} | "
        f"{work:.0f} PFLOP |"
    )


def main() -> None:
    """Write the table into the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(before + BEGIN + table(outlines()) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
