"""The whole job on a small trained trio that ships with the package, beside task arithmetic."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from mergekit.common import ModelReference

from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.commands.console import Console, duration
from rain_mergekit.commands.moving_bar import moving_bar
from rain_mergekit.commands.run_calibration import run_calibration
from rain_mergekit.commands.thread_choice import threads_for_model
from rain_mergekit.config.merge_config import read_config
from rain_mergekit.demo.files import (
    ASKED,
    CALIBRATIONS,
    HELD_OUT,
    MERGES,
    REPORT,
    claim,
    write_report,
)
from rain_mergekit.demo.merging import merge_all
from rain_mergekit.demo.scoring import Record, Score, read_records, score
from rain_mergekit.evaluation.divergence import Drift
from rain_mergekit.evaluation.divergence_meter import DivergenceMeter
from rain_mergekit.evaluation.layerwise_drift import VerifyOptions
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.generation import Answer, generate, load_model
from rain_mergekit.models.loading import LoadOptions, read_model_config
from rain_mergekit.models.tokenizer import load_tokenizer
from rain_mergekit.system.shipped_files import TRIO
from rain_mergekit.system.wording import counted
from rain_mergekit.text.calibration_sets import load_reasoning

_MOST_TOKENS = 96
_EXAMPLES = ("upper", "end", "separate")


@dataclass(frozen=True)
class Result:
    """One model's row of the table, and what it wrote."""

    label: str
    scores: Score
    drift: Drift
    answers: list[Answer]


def run_demo(folder: Path, console: Console, threads: int | None = None) -> list[Result]:
    """Configure, calibrate, merge, evaluate, report; threads None: as many as suit the models.

    Raises RainError if the folder cannot be used (see `claim`) or a merge fails.
    """
    with threads_for_model(_open(TRIO / "reasoning"), threads):
        return _run(folder, console)


def _run(folder: Path, console: Console) -> list[Result]:
    start = time.monotonic()
    texts = claim(folder)
    console.heading(
        "Three small trained models: reasoning, instruct, pretrained (1.1 M parameters)"
    )
    console.print(f"  configurations in {folder}: {', '.join(texts)}")
    console.print()
    for name in CALIBRATIONS:
        config = read_config(folder / f"{name}.yml")
        run_calibration(config, RunOptions(quiet=not console.progress), console)
    console.print()
    console.heading("Merging with stock mergekit")
    merge_all(folder, console, torch.get_num_threads())
    console.print()
    records = read_records(TRIO / "test.jsonl", ASKED)
    console.heading(f"Asking {counted(len(records), 'prompt')} that calibration has not seen")
    results = _evaluate(folder, records, console)
    seconds = time.monotonic() - start
    numbers = {r.label: {**asdict(r.scores), "drift": asdict(r.drift)} for r in results}
    write_report(folder, {"seconds": round(seconds, 1), "models": numbers})
    _table(records, results, console)
    _examples(records, results, console)
    _next_steps(folder, console)
    console.print(f"Done in {duration(seconds)}; the numbers are in {folder / REPORT}.")
    return results


def _evaluate(folder: Path, records: list[Record], console: Console) -> list[Result]:
    """Every model's answers, and its drift from the reasoning model on the right outputs."""
    places = {
        "reasoning model": TRIO / "reasoning",
        "instruct model": TRIO / "instruct",
        **{label: folder / name for name, label in MERGES.items()},
    }
    opened = {label: _open(path) for label, path in places.items()}
    tokenizer = load_tokenizer(opened["reasoning model"])
    lines = [json.dumps({"prompt": r.prompt, "output": r.output}) + "\n" for r in records]
    (folder / HELD_OUT).write_text("".join(lines), encoding="utf-8")
    texts = load_reasoning(folder / HELD_OUT, tokenizer, keep_response=True).samples
    prompts, results = [record.prompt for record in records], []
    layers = int(read_model_config(opened["reasoning model"]).num_hidden_layers)
    passes = layers * sum(len(text.input_ids) for text in texts)
    with moving_bar(2 * len(opened) + 1, "models", console) as bar:

        def asked(answers: int) -> None:
            bar.update(answers / len(prompts))

        def measured(tokens: int) -> None:
            bar.update(tokens / passes)

        reasoning = opened["reasoning model"]
        with DivergenceMeter.of(reasoning, texts, VerifyOptions(LoadOptions()), measured) as meter:
            for label, checkpoint in opened.items():
                with bar.external_write_mode():
                    console.print(f"  {label}")
                model = load_model(checkpoint, "cpu", None)
                answers = generate(
                    model, tokenizer, prompts, max_new_tokens=_MOST_TOKENS, tick=asked
                )
                scores = score(records, [answer.thought for answer in answers])
                results.append(Result(label, scores, meter.drift(checkpoint, measured), answers))
    return results


def _open(path: Path) -> Checkpoint:
    # Not parsed: a folder's name may hold what has a meaning in mergekit's text form.
    return Checkpoint.open(ModelReference.model_validate({"model": {"path": str(path)}}))


def _table(records: list[Record], results: list[Result], console: Console) -> None:
    asked = sum(record.constraint is not None for record in records)
    console.print()
    console.print(f"{'':<28} thinking    plain |  with a format constraint ({asked}) |")
    console.heading(f"{'percent':<28} complete  correct |  correct  followed     both |   L_think")
    for result in results:
        s = result.scores
        console.print(
            f"{result.label:<28} {s.complete:>8.1f} {s.plain:>8.1f} | {s.correct:>8.1f}"
            f" {s.followed:>9.1f} {s.both:>8.1f} | {result.drift.think.mean:>9.4f}"
        )
    console.print(
        '"linear": only the weights that rain changes too; "projection": the paper\'s fit;'
    )
    console.print("0.7, 0.8, 1.2: the best strengths")


def _examples(records: list[Record], results: list[Result], console: Console) -> None:
    console.print()
    for constraint in _EXAMPLES:
        index = next(i for i, record in enumerate(records) if record.constraint == constraint)
        console.heading(f"> {records[index].prompt}")
        for result in results:
            console.print(f"  {result.label:<28} {_short(result.answers[index].text)}")


def _short(text: str, width: int = 60) -> str:
    """One line; long thinking is cut in its middle, the answer stays visible."""
    line = " ".join(text.split())
    if len(line) <= 2 * width:
        return line
    return f"{line[:width]} ... {line[-width:]}"


def _next_steps(folder: Path, console: Console) -> None:
    config, merged, data, calibration = (
        shlex.quote(str(folder / name))
        for name in ("rain.yml", "rain", HELD_OUT, CALIBRATIONS["rain"])
    )
    against = shlex.quote(str(TRIO / "reasoning"))
    console.print()
    console.heading("Next")
    console.print("  Look closer:")
    console.print(f"    mergekit-rain verify {merged} --against {against} --reasoning-data {data}")
    console.print("  See it in pictures (pip install 'rain-mergekit[report]'):")
    console.print(f"    mergekit-rain report {calibration} --merged {merged}")
    console.print("  Calibrate where needed, and merge, in one:")
    console.print(f"    mergekit-rain merge {config} {shlex.quote(str(folder / 'other'))}")
    console.print(f"  Your own models: copy {config}, put in your two models and your data.")
    console.print()
