"""The picture at the head of README: one answer before and after, and the language board.

`python docs/readme_picture.py` writes docs/img/readme.svg from the table of results-language.md and
the tutorial's answers; a test compares.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "img" / "readme.svg"
BOARD = ROOT / "docs" / "results-language.md"
TUTORIAL = ROOT / "docs" / "tutorial.md"
WIDTH, HEIGHT = 960, 400
# Left, top, width, height of the plot's area.
AREA = (560, 70, 350, 250)
Place = tuple[float, float]
STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #1f2328; }
  .title { font-weight: 600; } .small { font-size: 12px; }
  .mono { font-family: ui-monospace, monospace; font-size: 13px; }
  .soft { fill: #59636e; } .card { fill: #f6f8fa; stroke: #d1d9e0; } .page { fill: #ffffff; }
  .grid { stroke: #d1d9e0; stroke-width: 1; } .rule { stroke: #59636e; stroke-dasharray: 5 4; }
  .ours { fill: #0f766e; } .other { fill: #9a6700; } .origin { fill: #57606a; }
  .good { fill: #0f766e; font-weight: 600; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .soft { fill: #9198a1; } .card { fill: #151b23; stroke: #3d444d; }
    .page { fill: #0d1117; } .grid { stroke: #3d444d; } .rule { stroke: #9198a1; }
    .ours { fill: #2dd4bf; } .other { fill: #d29922; } .origin { fill: #9198a1; }
    .good { fill: #2dd4bf; }
  }
"""


def table() -> dict[str, tuple[float, float]]:
    """Of each row of the board: plain problems right, and right and followed, in percent."""
    text = BOARD.read_text(encoding="utf-8")
    part = text.partition("<!-- language table: begin")[2].partition("<!-- language table: end")[0]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in part.splitlines()
        if line.startswith("|")
    ]
    head, *body = rows
    plain, both = head.index("plain right"), head.index("both")
    found = {}
    for row in body:
        values = [re.match(r"[\d.]+", row[index]) for index in (plain, both)]
        if all(values):
            found[row[0]] = (float(values[0][0]), float(values[1][0]))  # type: ignore[index]
    return found


def ceiling() -> float:
    """What an answer of the instruct model after the reasoning model's thinking reaches."""
    text = BOARD.read_text(encoding="utf-8")
    found = re.search(r"the ceiling of \*both\* is (\d+) %", text)
    assert found
    return float(found[1])


def answers() -> tuple[str, str, str, str]:
    """The tutorial's prompt, the thinking that both models write, and their two answers."""
    text = TUTORIAL.read_text(encoding="utf-8")
    prompt = re.search(r'prompt = "(.*)"', text)
    block = (
        text.partition("<!-- output of ask -->")[2].partition("```text\n")[2].partition("```")[0]
    )
    thinking = re.search(r"<think>\n(.*)</think>", block)
    said = re.findall(r"answer : (.*?)<\|im_end\|>", block)
    assert prompt
    assert thinking
    return prompt[1], thinking[1], said[0], said[1]


def draw() -> str:
    """The whole SVG."""
    title = "One answer before and after the merge, and how merges of real language models compare"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
            f"<title>{title}</title><style>{STYLE}</style>",
            f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="12"/>',
            *_cards(),
            *_plot(),
            "</svg>\n",
        ]
    )


def _cards() -> list[str]:
    prompt, thinking, before, after = answers()
    asked, _, constraint = prompt.partition("? ")
    shown = [_text(24, 40, "Asked", "title"), _text(24, 62, f"{asked}?", "mono")]
    shown.append(_text(24, 82, constraint, "mono good"))
    parts = (("The reasoning model", before, 106, ""), ("Merged", after, 246, "good"))
    for name, answer, top, kind in parts:
        shown.append(f'<rect class="card" x="24" y="{top}" width="490" height="126" rx="8"/>')
        shown.append(_text(40, top + 26, name, "title"))
        half = thinking.find(" . c ") + 2
        shown.append(_text(40, top + 50, f"<think> {thinking[:half]}", "mono soft"))
        shown.append(_text(40, top + 70, f"{thinking[half:].strip()} </think>", "mono soft"))
        shown.append(_text(40, top + 98, f"answer : {answer}", f"mono {kind}".strip()))
    return shown


def _plot() -> list[str]:
    left, top, width, height = AREA
    most = 10 * (int(ceiling()) // 10 + 1)

    def place(plain: float, both: float) -> tuple[float, float]:
        return left + width * plain / 100, top + height * (1 - both / most)

    shown = [_text(left, 36, "Merges of language models, 135 M parameters", "title")]
    shown.append(_text(left, 54, "answers right and as asked, percent", "small soft"))
    for value in range(0, most + 1, 20):
        y = place(0, value)[1]
        shown.append(f'<path class="grid" d="M{left} {y:.0f}H{left + width}"/>')
        shown.append(_text(left - 8, y + 4, str(value), "small soft", "end"))
    for value in range(0, 101, 20):
        x = place(value, 0)[0]
        shown.append(_text(x, top + height + 18, str(value), "small soft", "middle"))
    shown.append(
        _text(
            left + width / 2,
            top + height + 38,
            "plain problems right, percent",
            "small soft",
            "middle",
        )
    )
    y = place(0, ceiling())[1]
    shown.append(f'<path class="rule" d="M{left} {y:.0f}H{left + width}"/>')
    shown.append(_text(left + 4, y - 7, "about the most that a merge can reach", "small soft"))
    points = {name: place(*values) for name, values in table().items()}
    crowd = sorted((n for n, at in points.items() if at[0] < left + width / 2), key=points.get)
    labels = _column([points[name] for name in crowd], y + 16)
    beside = dict(zip(reversed(crowd), labels, strict=True))  # the rightmost dot has the first
    for name, at in points.items():
        shown += _point(name, at, beside.get(name))
    return shown


def _column(dots: Sequence[Place], first: float) -> list[Place]:
    """Where a crowd's labels stand: to its right, from `first` to just above its highest dot."""
    x, last = max(x for x, _ in dots) + 14, min(y for _, y in dots) - 10
    step = min(15.0, (last - first) / (len(dots) - 1))
    return [(x, last - step * left) for left in reversed(range(len(dots)))]


def _point(name: str, at: Place, label: Place | None) -> list[str]:
    """A dot with its label: at its place, else to the left; of the trio's models to the right."""
    kind = "ours" if name.startswith("rain") else "origin"
    kind = "other" if kind == "origin" and name not in ("reasoning", "instruct") else kind
    x, y = at
    bold = " title" if kind == "ours" else ""
    left = label is None and kind != "origin"
    where, line = label or (x - 11 if left else x + 11, y + 4)
    text = re.sub(r" at [\d.]+$", "", name)
    anchor = "end" if left else "start"
    return [
        f'<circle class="{kind}" cx="{x:.0f}" cy="{y:.0f}" r="{6 if kind == "ours" else 5}"/>',
        _text(where, line, text, f"small{bold}", anchor),
    ]


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    end = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{kind}" x="{x:.0f}" y="{y:.0f}"{end}>{escape(text)}</text>'


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
