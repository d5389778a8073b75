"""Calibration sets and configurations that are broken in any way give one clear message.

`RAIN_FUZZ_EXAMPLES=N` mutates N inputs a test instead of a few.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from hangs import HANGS
from hypothesis import given
from mergekit.config import MergeConfiguration
from mutations import FUZZ, chances, changed, edited, edited_text, value
from tiny import INSTRUCTION, REASONING, make_tokenizer

import rain_mergekit
from rain_mergekit.calibration_file.published_coefficients import read_alpha
from rain_mergekit.config.merge_config import read_config
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.errors import RainError
from rain_mergekit.text.calibration_sets import load_reasoning, read_instruction, read_reasoning

KEYS = ("prompt", "reasoning", "response")
SETS = {
    "reasoning": "\n".join(json.dumps(dict(zip(KEYS, s, strict=True))) for s in REASONING),
    "instruction": "\n".join(json.dumps(sample) for sample in INSTRUCTION),
}
READERS: dict[str, Callable[[Path], object]] = {
    "reasoning": read_reasoning,
    "instruction": read_instruction,
}
YAML = """\
merge_method: rain
base_model: ./reasoning
models:
  - {model: ./instruct, parameters: {role: instruct}}
  - {model: ./pretrained, parameters: {role: pretrained}}
parameters: {calibration: ./c.rain.safetensors, lambda: [0.5, 1.0]}
dtype: bfloat16
rain: {reasoning_data: r, instruction_data: i, fit: projection, rank_by: count, rank_count: 4}
"""
FIELDS = yaml.safe_load(YAML)
# Every setting there is, every word that one of them may be, every other field of mergekit's.
SETTINGS = RainSettings(reasoning_data="r", instruction_data="i").model_dump(mode="json")
WORDS = re.findall(
    r'"(?:const|enum)": (\[.*?\]|".*?")', json.dumps(RainSettings.model_json_schema())
)
CHOICES = sorted({word for item in WORDS for word in re.findall(r'"(.*?)"', item)})
OTHERS = sorted(set(MergeConfiguration.model_fields) - set(FIELDS))
ALPHA = {
    "alpha": [0.5, 0.25, 1.0, 0.0],
    "axes_info": {"flat_index": [[0, 0, "QK"], [0, 1, "QK"], [1, 0, "Q"], [1, 0, "K"]]},
}


def configuration(chance: Random) -> dict[str, Any]:
    """With five more of all settings, and one time in four with a field that we do not use."""
    more = {name: SETTINGS[name] for name in chance.sample(sorted(SETTINGS), 5)}
    others = {} if chance.randrange(4) else {chance.choice(OTHERS): value(chance)}
    return {**FIELDS, **others, "rain": {**more, **FIELDS["rain"]}}


def message(path: Path, read: Callable[[Path], object]) -> str:
    """What is said about the file; nothing when it can be read."""
    try:
        read(path)
    except RainError as error:
        return str(error)
    return ""


def check(said: str, path: Path, most: int = 1000) -> None:
    """It names the file, and can be printed and read, whatever the file holds."""
    assert not said or path.name in said
    assert len(said.encode()) < most


@pytest.mark.parametrize("kind", SETS)
@FUZZ
@given(chance=chances)
def test_bytes_of_sets(tmp_path: Path, kind: str, chance: Random) -> None:
    path = tmp_path / "fuzzed.jsonl"
    path.write_bytes(edited_text(SETS[kind], chance))
    check(message(path, READERS[kind]), path)


@pytest.mark.parametrize("kind", SETS)
@FUZZ
@given(chance=chances)
def test_fields_of_sets(tmp_path: Path, kind: str, chance: Random) -> None:
    path = tmp_path / "fuzzed.json"
    samples = [json.loads(line) for line in SETS[kind].splitlines()]
    path.write_text(json.dumps(changed(samples, chance)))
    check(message(path, READERS[kind]), path)


@FUZZ
@given(chance=chances)
def test_published_coefficients(tmp_path: Path, chance: Random) -> None:
    path = tmp_path / "fuzzed.json"
    text = json.dumps(ALPHA if chance.randrange(2) else changed(ALPHA, chance))
    path.write_bytes(edited(text.encode(), chance) if chance.randrange(2) else text.encode())
    check(message(path, read_alpha), path)


@FUZZ
@given(chance=chances)
def test_bytes_of_configurations(tmp_path: Path, chance: Random) -> None:
    path = tmp_path / "fuzzed.yml"
    # The time that PyYAML takes grows with the square of the depth; it ends at a third of this one.
    path.write_bytes(edited_text(YAML, chance).replace(b"[" * 800, b""))
    check(message(path, read_config), path, 6000)  # ten settings at once


def test_the_fuzzed_configuration_has_all_that_there_is() -> None:
    assert set(SETTINGS) == set(RainSettings.model_fields)
    assert {"oblique", "closed_form", "unseen", "auto", "no_thinking", "full"} <= set(CHOICES)
    assert {"tokenizer", "slices", "out_dtype"} <= set(OTHERS)


@FUZZ
@given(chance=chances)
def test_fields_of_configurations(tmp_path: Path, chance: Random) -> None:
    path = tmp_path / "fuzzed.yml"
    content = changed(configuration(chance), chance, *CHOICES)
    path.write_text(json.dumps(content))  # which YAML reads, too
    check(message(path, read_config), path, 6000)  # ten settings at once


def test_a_template_that_reaches_for_python_is_refused(tmp_path: Path) -> None:
    """Chat templates render in transformers' sandbox: what they must not touch raises there."""
    path = tmp_path / "reasoning.jsonl"
    path.write_text(SETS["reasoning"])
    touched = tmp_path / "touched"
    reach = "{{ cycler.__init__.__globals__.os.system('touch " + str(touched) + "') }}"
    hostile = make_tokenizer(reach + "{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(RainError, match=r"the chat template of .* refuses this sample"):
        load_reasoning(path, hostile)
    assert not touched.exists()


@pytest.mark.parametrize(
    "program",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{% include '/etc/passwd' %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 1/0 }}{{ messages[7].content }}",
    ],
)
def test_what_a_template_must_not_do_is_one_message(tmp_path: Path, program: str) -> None:
    path = tmp_path / "reasoning.jsonl"
    path.write_text(SETS["reasoning"])
    hostile = make_tokenizer(program + "{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(RainError, match=r"the chat template of .* refuses this sample"):
        load_reasoning(path, hostile)


def test_templates_are_rendered_by_transformers_alone() -> None:
    """Of jinja2 the package uses the errors, and for its own page an environment that escapes."""
    used = {
        (path.name, node.attr)
        for path in Path(rain_mergekit.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "jinja2"
    }
    assert used == {
        ("chat_template.py", "TemplateError"),
        ("templates.py", "Environment"),
        ("templates.py", "FunctionLoader"),
        ("templates.py", "StrictUndefined"),
    }


# The long run's watch, first over what it must notice, each in a child, then over some inputs.
WATCHED = """
import os, pickle, socket, subprocess, sys, tempfile
from pathlib import Path
import fuzz

def noticed(act):
    if os.fork():
        return os.waitstatus_to_exitcode(os.wait()[1])
    folder = Path(tempfile.gettempdir(), "watched")
    alone = fuzz.Alone(folder)
    sys.addaudithook(alone)
    alone.armed = True
    try:
        act()
    finally:
        os._exit(0)

acts = [
    lambda: open("/etc/passwd"),
    lambda: open(tempfile.gettempdir() + "/watched/../other", "w"),
    lambda: os.system("true"),
    lambda: subprocess.run(["true"]),
    lambda: socket.create_connection(("127.0.0.1", 9)),
    lambda: pickle.loads(pickle.dumps(os.system)),
    lambda: os.rename("a", "b"),
    lambda: None,
]
print([noticed(act) for act in acts], flush=True)
fuzz.main(60)
"""


def test_reading_a_file_does_nothing_else() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr
    found, *targets = done.stdout.splitlines()
    assert found == "[1, 1, 1, 1, 1, 1, 1, 0]"
    assert len(targets) == 9
