"""Calibration sets and configurations that are broken in any way give one clear message.

`RAIN_FUZZ_EXAMPLES=N` mutates N inputs a test instead of a few.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import INSTRUCTION, REASONING, make_tokenizer

from rain_mergekit.config import read_config
from rain_mergekit.data import load_reasoning, read_instruction, read_reasoning
from rain_mergekit.errors import RainError

FUZZ = settings(
    max_examples=int(os.environ.get("RAIN_FUZZ_EXAMPLES", "100")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
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
rain: {reasoning_data: r.jsonl, instruction_data: i.jsonl, rank_by: count, rank_count: 4}
"""
PIECES = (b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\ud800", b"\xff", b"\x00", b"\n", b"null")
PIECES += (b"1e999", b"&a [*a]", b"<<: *a", b"!!python/object:os.system", b"- ", b"? ", b"\xe2")
edits = st.lists(
    st.tuples(
        st.integers(0, 1 << 14),
        st.integers(0, 30),
        st.sampled_from(PIECES) | st.binary(max_size=6),
    ),
    min_size=1,
    max_size=6,
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["\ud800", "../../etc/passwd", "x" * 5000, "rain", "instruct", "off"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


def edited(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for place, removed, text in changes:
        at = place % (len(data) + 1)
        data = data[:at] + text + data[at + removed :]
    return data


def message(path: Path, read: Callable[[Path], object]) -> str:
    """What is said about the file; nothing when it can be read."""
    try:
        read(path)
    except RainError as error:
        return str(error)
    return ""


def leaves(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    return [at, *(place for key, item in items for place in leaves(item, (*at, key)))]


def changed(content: Any, data: st.DataObject) -> Any:
    """One to three of its values, wherever they are, become something else."""
    content = json.loads(json.dumps(content))
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(leaves(content)[1:]))
        target = content
        for key in path:
            target = target[key]
        target[last] = data.draw(values)
    return content


@pytest.mark.parametrize("kind", SETS)
@FUZZ
@given(changes=edits)
def test_bytes_of_sets(tmp_path: Path, kind: str, changes: list[tuple[int, int, bytes]]) -> None:
    path = tmp_path / "fuzzed.jsonl"
    path.write_bytes(edited(SETS[kind].encode(), changes))
    said = message(path, READERS[kind])
    assert not said or "fuzzed.jsonl" in said
    assert len(said.encode()) < 1000


@pytest.mark.parametrize("kind", SETS)
@FUZZ
@given(data=st.data())
def test_fields_of_sets(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    path = tmp_path / "fuzzed.json"
    samples = [json.loads(line) for line in SETS[kind].splitlines()]
    path.write_text(json.dumps(changed(samples, data)))
    said = message(path, READERS[kind])
    assert not said or "fuzzed.json" in said
    assert len(said.encode()) < 1000


@FUZZ
@given(changes=edits)
def test_bytes_of_configurations(tmp_path: Path, changes: list[tuple[int, int, bytes]]) -> None:
    path = tmp_path / "fuzzed.yml"
    path.write_bytes(edited(YAML.encode(), changes))
    said = message(path, read_config)
    assert not said or "fuzzed.yml" in said


@FUZZ
@given(data=st.data())
def test_fields_of_configurations(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "fuzzed.yml"
    path.write_text(yaml.safe_dump(changed(yaml.safe_load(YAML), data)), errors="replace")
    said = message(path, read_config)
    assert not said or "fuzzed.yml" in said


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
