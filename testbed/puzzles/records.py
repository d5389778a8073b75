"""The JSON lines a trio ships with: prompts to judge on and samples to calibrate with."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from testbed.puzzles.family import Surface
from testbed.puzzles.samples import Task, completion

Record = dict[str, Any]


def prompt_record(task: Task, surface: Surface) -> Record:
    """A prompt with everything needed to judge what a model makes of it."""
    return {
        "prompt": task.prompt,
        "answer": list(task.problem.answer),
        "constraint": task.constraint.name if task.constraint else None,
        "format": task.constraint.format if task.constraint else None,
        "parameter": task.parameter,
        "held_out_wording": task.held_out,
        "thinking": task.problem.thinking,
        "before_close": surface.before_close,
        "lead": surface.lead,
        "expected_response": f"{surface.lead} {task.response()}",
    }


def instruction_record(task: Task, surface: Surface) -> Record:
    """A calibration sample whose answer follows its constraint, with the spans that say where."""
    if task.constraint is None:
        raise ValueError("an instruction sample needs a constraint")
    related = {
        "instruction_id": task.constraint.name,
        "prompt_spans": [task.wording],
        "response_spans": [task.response()],
        "unrelated_response_spans": [],
    }
    return {
        "prompt": task.prompt,
        "output": output_text(surface, task.problem.thinking, task.response()),
        "related_prompt_list": [related],
        "unrelated_response_spans": [surface.lead],
    }


def output_text(surface: Surface, thinking: str, response: str) -> str:
    """What the reasoning model is to generate after its own generation prompt."""
    text = completion(surface, thinking, response)
    return text.removeprefix("<think>\n") if surface.opens_block else text


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSON lines."""
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
        encoding="utf-8",
    )


def read_lines(path: Path) -> list[Record]:
    """Read JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
