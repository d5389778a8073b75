"""The steps of `data reasoning` and `data instruction`: ask, keep, choose, write, report."""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from rain_mergekit.commands.asking import writer_of
from rain_mergekit.commands.data_options import BuildOptions
from rain_mergekit.commands.json_output import print_json
from rain_mergekit.commands.options import given_markers
from rain_mergekit.errors import RainError

if TYPE_CHECKING:
    from rain_mergekit.commands.console import Console
    from rain_mergekit.data_building.balance import Candidate
    from rain_mergekit.data_building.collect import Collected
    from rain_mergekit.data_building.judge import Kept
    from rain_mergekit.data_building.tasks import Writer, Written
    from rain_mergekit.text.markers import Markers


_SHOWN = 6  # reasons that a line of the summary names


def build(
    prompts: Sequence[Any],
    candidate: Callable[[Any, Kept], Candidate],
    options: BuildOptions,
    console: Console,
) -> None:
    """Ask, keep, choose, write; say what was done. Raises RainError if nothing can be kept.

    candidate: the sample made from a prompt and an answer with a complete thinking block; it may
    raise DroppedError.
    """
    from dataclasses import asdict  # noqa: PLC0415 - keeps --help fast

    from rain_mergekit.data_building.balance import choose  # noqa: PLC0415
    from rain_mergekit.data_building.collect import collect  # noqa: PLC0415
    from rain_mergekit.data_building.journal import SUFFIX, Journal  # noqa: PLC0415
    from rain_mergekit.data_building.output import refuse_overwriting, write_samples  # noqa: PLC0415
    from rain_mergekit.system.wording import counted  # noqa: PLC0415

    start, output = time.monotonic(), options.output
    refuse_overwriting(output, output + SUFFIX)
    console.print(f"Asking {options.model}: {counted(len(prompts), 'prompt')}")
    kwargs = options.chat_template_kwargs
    writer, sampling = writer_of(options.model, options.asking, kwargs, options.loading)
    template = {"chat_template_kwargs": kwargs}
    judge = _judge(writer, given_markers(options.markers), kwargs, candidate)
    with Journal(output, {**writer.identity, **asdict(sampling), **template}) as journal:
        known = len(journal)
        if known:
            console.print(f"{counted(known, 'answer')} in {journal.path} already")
        try:
            found = collect(
                prompts,
                lambda prompt: str(prompt.text),
                writer,
                journal,
                judge,
                attempts=options.attempts,
                quiet=not console.progress,
            )
        except KeyboardInterrupt:
            kept = counted(len(journal), "answer")
            hint = f"{kept} kept in {journal.path}; the same command goes on"
            raise KeyboardInterrupt(hint) from None
        found.dropped.update(getattr(writer, "refused", ()))
        if not found.kept:
            raise RainError(f"no answer of {found.asked} can be kept ({_reasons(found.dropped)})")
        chosen = choose(found.kept, options.count, options.asking.seed)
        write_samples(output, [item.sample for item in chosen])
        _summary(found, chosen, options, time.monotonic() - start, console)
        console.print(
            f"  every answer is kept in {journal.path}: another --count asks for none again"
        )
    console.print(f"Next: mergekit-rain data check {output}{_reading(options)}")
    if options.as_json:
        context = click.get_current_context().info_name
        print_json(f"data {context}", _content(found, chosen, output))


def _content(
    found: Collected[Candidate], chosen: Sequence[Candidate], output: str
) -> dict[str, Any]:
    """The summary of the finished set as plain values, for `--json`."""
    return {
        "file": output,
        "samples": len(chosen),
        "answers": found.asked,
        "new": found.generated,
        "usable": len(found.kept),
        "dropped": dict(found.dropped),
        "groups": dict(Counter(group for item in chosen for group in item.groups if group)),
    }


def _reading(options: BuildOptions) -> str:
    """The options with which `data check` sees what the model has seen."""
    found = "" if options.asking.server else f" --model {options.model}"
    if options.chat_template_kwargs and not options.asking.server:
        found += f" --chat-template-kwargs '{json.dumps(options.chat_template_kwargs)}'"
    return found + "".join(f" --markers {shlex.join(pair)}" for pair in options.markers)


def _judge(
    writer: Writer,
    markers: Markers | None,
    template: dict[str, Any],
    candidate: Callable[[Any, Kept], Candidate],
) -> Callable[[Any, Written], Candidate]:
    """Keeps or drops an answer; markers None: those of the model here, or of a server's answer."""
    from rain_mergekit.data_building.judge import keep, known_format  # noqa: PLC0415
    from rain_mergekit.text.marker_detection import text_markers  # noqa: PLC0415

    markers, opens = known_format(writer, markers, template)

    def judge(prompt: Any, written: Written) -> Candidate:
        found = markers or text_markers(written.text)
        return candidate(prompt, keep(written, found, opened_by_template=opens))

    return judge


def _reasons(dropped: Counter[str]) -> str:
    shown = [f"{count} {reason}" for reason, count in dropped.most_common(_SHOWN)]
    return "; ".join(shown)


def _summary(
    found: Collected[Candidate],
    chosen: Sequence[Candidate],
    options: BuildOptions,
    seconds: float,
    console: Console,
) -> None:
    from rain_mergekit.commands.console import duration  # noqa: PLC0415
    from rain_mergekit.system.wording import counted  # noqa: PLC0415

    console.heading(f"Wrote {options.output}: {counted(len(chosen), 'sample')}")
    console.print(
        f"  {counted(found.asked, 'answer')}, {found.generated} of them new, {duration(seconds)}; "
        f"{len(found.kept)} can be used"
    )
    if found.dropped:
        console.print(f"  dropped: {_reasons(found.dropped)}")
    groups = Counter(group for item in chosen for group in item.groups if group)
    if groups:
        console.print("  " + ", ".join(f"{name} {n}" for name, n in sorted(groups.items())))
    lengths = [item.length for item in chosen]
    console.print(
        f"  thinking of {min(lengths)} to {max(lengths)} words, half of them below "
        f"{median(lengths):.0f}"
    )
    if options.count and len(chosen) < options.count:
        console.warn(
            f"{len(chosen)} of {options.count} samples: give more prompts, or more "
            "--attempts with a --temperature above 0"
        )
