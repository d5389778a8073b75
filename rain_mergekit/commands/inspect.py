"""`mergekit-rain inspect`: one screen about a calibration file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import TYPE_CHECKING

import click

from rain_mergekit.commands.json_output import print_json
from rain_mergekit.commands.options import typed
from rain_mergekit.commands.starting import end_notice
from rain_mergekit.system.terminal_safe import clean

if TYPE_CHECKING:
    from rain_mergekit.calibration_file.site_names import Kind, ValueRange
    from rain_mergekit.calibration_file.stream_summary import MatchedLayer, Matching
    from rain_mergekit.calibration_file.summary import Data, FileSummary


WIDTH = 80
_SHOWN = 12  # experts by number
# From low to high, in the terminal's 256 colours: blue, grey, orange.
_COLOURS = (25, 31, 67, 109, 145, 180, 179, 173, 166)


@dataclass(frozen=True)
class InspectOptions:
    """What the command line says."""

    calibration: str
    as_json: bool


@click.command(epilog="\b\nExample:\n  mergekit-rain inspect trio.rain.safetensors --json")
@click.argument("calibration", metavar="CALIB", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, for programs.")
@typed(InspectOptions)
def inspect(options: InspectOptions) -> None:
    """Show what the calibration file CALIB holds: models, data, settings, protection, warnings.

    Only the header and the statistics of the heads are read, so large files are quick too.
    `mergekit-rain report` draws more of it.
    """
    from rain_mergekit.calibration_file.reader import CalibrationFile  # noqa: PLC0415 - keeps --help fast
    from rain_mergekit.calibration_file.summary import summarise  # noqa: PLC0415

    file = CalibrationFile.open(options.calibration)
    try:
        summary = summarise(file)
    finally:
        file.close()
    if options.as_json:
        print_json("inspect", asdict(summary))
        return
    from rain_mergekit.commands.console import shows_blocks  # noqa: PLC0415 - keeps --help fast

    end_notice()
    for line in _screen(summary, blocks=shows_blocks()):
        click.echo(line)


def _screen(summary: FileSummary, *, blocks: bool) -> list[str]:
    from rain_mergekit.commands.console import size  # noqa: PLC0415
    from rain_mergekit.system.wording import counted  # noqa: PLC0415

    about = f"{size(summary.bytes)}, {counted(summary.tensors, 'weight')} to merge"
    lines = [_head(summary.path), f"  for merge_method: {summary.kind}"]
    lines += [f"  {about}; written by {clean(summary.created_by)}"]
    lines += [_head("Models"), *_table(list(summary.listed.items()))]
    if summary.data:
        lines += [
            _head("Data"),
            *_table([row for k, v in summary.data.items() for row in _data(k, v)]),
        ]
    lines += _settings(summary)
    if summary.taken_back:
        low, high = min(summary.taken_back), max(summary.taken_back)
        lines += [_head("Channels: share of an even change taken back at omega 0.4")]
        lines += [f"  {low:.3f} to {high:.3f} over {counted(len(summary.taken_back), 'weight')}"]
    elif summary.matching is not None:
        lines += _matching(summary.matching)
    else:
        lines += [_head("Protection: mean over layers (lowest-highest rank, lowest share)")]
        lines += _kinds(summary.kinds)
    lines += _coefficients(summary, blocks=blocks)
    if summary.warnings:
        lines.append(click.style("Warnings", bold=True, fg="yellow"))
        for text in summary.warnings:
            lines += _wrapped(text)
    return lines


def _settings(summary: FileSummary) -> list[str]:
    own = () if summary.preset is None else summary.preset.beside
    changed = [
        (name, json.dumps(value) + (", beside the preset" if name in own else ""))
        for name, value in summary.changed.items()
    ]
    nothing = ["  none" if summary.settings else "  not recorded"]
    lines = [_head("Settings that differ from the defaults")]
    lines += _table(changed) if changed else nothing
    if summary.preset is not None:
        lines.append(_head(f"Where preset: {summary.preset.name} is not what it is named after"))
        lines += [line for text in summary.preset.limits for line in _wrapped(text)]
    return lines


def _wrapped(text: str) -> list[str]:
    return wrap(clean(text), WIDTH, initial_indent="  ", subsequent_indent="    ")


def _head(text: str) -> str:
    return click.style(clean(text), bold=True)


def _table(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(clean(name)) for name, _ in rows)
    return [f"  {clean(name):<{width}}  {clean(text)}" for name, text in rows]


def _data(name: str, data: Data) -> list[tuple[str, str]]:
    used, total = (str(n) if n is not None else "?" for n in (data.used, data.total))
    positions = f", {data.positions} positions" if data.positions is not None else ""
    later = f", {data.later} of them later in a chat" if data.later else ""
    digest = data.sha256[:12] or "?"
    said = f"{used} of {total} samples{later}{positions}, sha256 {digest}"
    return [(name, said), ("", data.path)]


def _kinds(kinds: tuple[Kind, ...]) -> list[str]:
    names = [clean(" ".join(kind.modules) or kind.name) for kind in kinds]
    wide = max([len("input of"), *map(len, names)])
    head = f"  {'input of':<{wide}} {'sites':>5} {'width':>5}  {'rank':<14}"
    lines = [f"{head}  {'kept energy':<13}  kept response"]
    for name, kind in zip(names, kinds, strict=True):
        rank = f"{kind.rank.mean:.1f} ({kind.rank.low:.0f}-{kind.rank.high:.0f})"
        lines.append(
            f"  {name:<{wide}} {kind.sites:>5} {kind.width.high:>5.0f}  {rank:<14}  "
            f"{_share(kind.kept):<13}  {_share(kind.response)}".rstrip()
        )
    return lines if kinds else ["  nothing is projected"]


def _penalty(found: ValueRange | None) -> str:
    """The ridge penalties of a module's weights; nothing in files that do not say."""
    if found is None:
        return ""
    return f"{found.low:g}" if found.low == found.high else f"{found.low:g}-{found.high:g}"


def _matching(found: Matching) -> list[str]:
    """Ranks by module, and the errors after the first, the middle and the last layer."""
    names = [clean(module.name) for module in found.modules]
    wide = max([len("change of"), *map(len, names)])
    lines = [_head("Stream matching: mean over layers (lowest-highest rank, lowest share)")]
    head = f"  {'change of':<{wide}} {'rank':<14}  {'of full rank':<13}"
    lines += [f"{head}  {'of the target':<13}  penalty"]
    for name, module in zip(names, found.modules, strict=True):
        rank = f"{module.rank.mean:.1f} ({module.rank.low:.0f}-{module.rank.high:.0f})"
        lines.append(
            f"  {name:<{wide}} {rank:<14}  {_share(module.explained):<13}  "
            f"{_share(module.fitted):<13}  {_penalty(module.epsilon)}".rstrip()
        )
    if found.origin:
        lines.append(f"  {found.origin}")
    return [*lines, *_experts(found), *_distances(found)]


def _experts(found: Matching) -> list[str]:
    """Tokens of the experts of each layer, and which experts stay the reasoning model's."""
    rows = []
    for one in (experts for layer in found.layers for experts in layer.experts):
        left = [f"{_numbers(one.few)} with too few"] if one.few else []
        left += [f"{_numbers(kept)} of {name}" for name, kept in one.worse.items() if kept]
        tokens = f"{min(one.tokens)} to {max(one.tokens)} tokens each"
        rows.append((one.name, f"{tokens}; unchanged: {', '.join(left) or 'none'}"))
    head = _head("Experts: fitted tokens, and those that stay as they are")
    return [head, *_table(rows)] if rows else []


def _numbers(experts: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, experts[:_SHOWN]))
    return shown + (f" and {len(experts) - _SHOWN} more" if len(experts) > _SHOWN else "")


def _distances(found: Matching) -> list[str]:
    last = len(found.layers) - 1
    chosen = [found.layers[i] for i in sorted({0, last // 2, last})] if found.layers else []
    wide = max([len("layer"), *(len(clean(layer.name)) for layer in chosen)])
    lines = [_head("Distance of the merged hidden states from their teacher (held out)")]
    lines += [f"  {'layer':<{wide}}  " + "  ".join(f"{group:<15}" for group in found.groups)]
    lines += [
        f"  {clean(layer.name):<{wide}}  "
        + "  ".join(f"{_error(layer, group):<15}" for group in found.groups).rstrip()
        for layer in chosen
    ]
    return lines


def _error(layer: MatchedLayer, group: str) -> str:
    fitted, held_out = layer.fitted.get(group, math.nan), layer.held_out.get(group)
    return f"{fitted:.3f} ({'-' if held_out is None else f'{held_out:.3f}'})"


def _share(value: ValueRange | None) -> str:
    return "-" if value is None else f"{value.mean:.3f} ({value.low:.3f})"


def _coefficients(summary: FileSummary, *, blocks: bool) -> list[str]:
    from rain_mergekit.report.text_heatmap import BLOCKS, DIGITS, band_names, heat_rows  # noqa: PLC0415

    alpha = [layer.heads.get("alpha", ()) for layer in summary.layers]
    finite = [value for column in alpha for value in column if math.isfinite(value)]
    if not finite:
        return []
    low, high = min(finite), max(finite)
    marks = BLOCKS if blocks else DIGITS
    title = f"Coefficients alpha: {len(alpha)} layers across, heads down; "
    lines = [_head(f"{title}{marks[0]} = {low:.2f}, {marks[-1]} = {high:.2f}")]
    names = band_names(max(len(column) for column in alpha))
    wide = max(len(name) for name in names)
    for name, (text, levels) in zip(names, heat_rows(alpha, low, high, marks), strict=True):
        lines.append(f"  {name:<{wide}} {_coloured(text, levels) if blocks else text}")
    return lines


def _coloured(text: str, levels: list[float]) -> str:
    last = len(_COLOURS) - 1
    return "".join(
        char if math.isnan(level) else click.style(char, fg=_COLOURS[round(level * last)])
        for char, level in zip(text, levels, strict=True)
    )
