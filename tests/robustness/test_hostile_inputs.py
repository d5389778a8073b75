"""Files that have no end, promise more than they hold, or name places outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hangs import HANGS
from test_fuzz_readers import YAML
from tiny import Tiny

from rain_mergekit.calibration_file.published_coefficients import read_alpha
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.config.merge_config import read_config
from rain_mergekit.data_building.prompts import read_prompts
from rain_mergekit.errors import RainError
from rain_mergekit.report.front_matter import with_tags
from rain_mergekit.report.model_card import carry_over
from rain_mergekit.text.calibration_sets import read_instruction, read_reasoning

READERS: dict[str, Callable[[Path], object]] = {
    "reasoning": read_reasoning,
    "instruction": read_instruction,
    "prompts": read_prompts,
    "coefficients": read_alpha,
    "configuration": read_config,
    "calibration": CalibrationFile.open,
}


@pytest.mark.parametrize("kind", ["device", "link to a device", "pipe"])
@pytest.mark.parametrize("name", READERS)
def test_what_has_no_end_is_not_read(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / "endless"
    if kind == "device":
        path = Path("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)  # with nobody who writes: opening it would wait for ever
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(RainError, match="not a regular file"):
        READERS[name](path)


def test_a_card_that_has_no_end_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "README.md").symlink_to("/dev/zero")
    with pytest.raises(RainError, match="is a link to outside of its folder"):
        carry_over(tmp_path, tmp_path / "new")
    (tmp_path / "README.md").unlink()
    os.mkfifo(tmp_path / "README.md")
    with pytest.raises(OSError, match="not a regular file"):
        carry_over(tmp_path, tmp_path / "new")


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40)
)


@pytest.mark.parametrize("bomb", [LAUGHS, MERGES, "a: &a [*a]\n", "a: &a {b: *a}\n"])
def test_aliases_that_multiply_are_refused(tmp_path: Path, bomb: str) -> None:
    """A few hundred bytes that stand for 10^12 values."""
    path = tmp_path / "config.yml"
    path.write_text(bomb + YAML)
    with pytest.raises(RainError, match="its aliases repeat too much, or contain themselves"):
        read_config(path)
    with pytest.raises(RainError, match="its aliases repeat too much, or contain themselves"):
        with_tags(f"---\n{bomb}---\n", ["rain"])


def test_half_characters_are_refused(tmp_path: Path) -> None:
    """YAML does not join the two halves that JSON writes for one character, as in a name."""
    path = tmp_path / "config.yml"
    for name in ('"\\ud83d\\ude00"', '"x\\udfff"', '["\\ud800"]'):
        path.write_text(YAML.replace("./reasoning", name))
        with pytest.raises(RainError, match="not valid YAML: it holds a lone surrogate"):
            read_config(path)
    path.write_text(YAML.replace("./reasoning", '"\\U0001f600"'), encoding="utf-8")
    assert str(read_config(path).reasoning) == "\U0001f600"


def test_ordinary_aliases_work(tmp_path: Path) -> None:
    content = yaml.safe_load(YAML)
    path = tmp_path / "config.yml"
    path.write_text("s: &s {window: 7}\n" + YAML.replace("rain: {", "rain: {<<: *s, "))
    config = read_config(path)
    assert config.settings.window == 7
    assert config.settings.reasoning_data == content["rain"]["reasoning_data"]


# Reads each file in a process of its own, and says how much memory that took beyond what the
# process had before: [bytes, what was raised] for each.
MEASURE = """
import json, os, resource, sys
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.errors import RainError
from rain_mergekit.calibration_file.published_coefficients import read_alpha
from rain_mergekit.system.json_samples import read_samples
from rain_mergekit.text.samples import parse_instruction, parse_reasoning

READ = {
    "calibration": CalibrationFile.open,
    "reasoning": lambda path: read_samples(path, parse_reasoning),
    "instruction": lambda path: read_samples(path, parse_instruction),
    "coefficients": read_alpha,
}

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

def attempt(kind, path):
    try:
        READ[kind](path)
    except RainError as error:
        return str(error)
    return ""

def one(kind, path):
    attempt(kind, os.__file__)  # code that is run for the first time takes memory too
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    before = peak()
    said = attempt(kind, path)
    print(json.dumps([peak() - before, said]), flush=True)

for kind, path in json.load(sys.stdin):
    if os.fork() == 0:
        one(kind, path)
        os._exit(0)
    os.wait()
"""
MIB = 1024**2


def header(**entry: object) -> bytes:
    text = json.dumps({"x": entry}).encode()
    return len(text).to_bytes(8, "little") + text


def samples(field: str, text: str) -> bytes:
    return json.dumps({"prompt": "p", "reasoning": "r", "response": "s", field: text}).encode()


FILES: dict[str, tuple[str, bytes]] = {
    "length of the header": ("calibration", (2**63).to_bytes(8, "little") + b"{}" * 100),
    "length within the limit": ("calibration", (90 * MIB).to_bytes(8, "little") + b"{}" * 100),
    "shape": ("calibration", header(dtype="F32", shape=[2**40], data_offsets=[0, 2**42])),
    "dimensions": ("calibration", header(dtype="F32", shape=[1] * 9999, data_offsets=[0, 4])),
    "offsets": ("calibration", header(dtype="F32", shape=[1], data_offsets=[2**62, 2**62 + 4])),
    "depth": ("calibration", (8 * MIB).to_bytes(8, "little") + b"[" * 8 * MIB),
    "depth of a list": ("reasoning", b"[" * 8 * MIB),
    "depth of a sample": ("instruction", b'{"a":' * MIB),
    "depth of coefficients": ("coefficients", b'{"alpha":' + b"[" * 8 * MIB),
    "line": ("reasoning", samples("prompt", "x" * 8 * MIB)),
    "broken line": ("reasoning", b'{"prompt": "' + b"x" * 8 * MIB),
    "number": ("reasoning", b'{"prompt": ' + b"9" * 8 * MIB + b"}"),
    "blank lines": ("instruction", b"\n" * MIB),
    "names": ("instruction", b"{" + b'"a":1,' * MIB + b'"a":1}'),
    "numbers": ("coefficients", b'{"axes_info": {}, "alpha": [' + b"0," * 2 * MIB + b"0]}"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_follows_the_file_not_what_it_says(tmp_path: Path) -> None:
    """At most a fixed amount for each byte that the file really has."""
    jobs = []
    for number, (kind, content) in enumerate(FILES.values()):
        path = tmp_path / str(number)
        path.write_bytes(content)
        jobs.append((kind, str(path)))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS,
    )
    assert done.stderr == ""
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(FILES)
    for (name, (_, content)), (peak, said) in zip(FILES.items(), found, strict=True):
        assert peak < 4 * MIB + 20 * len(content), name
        assert bool(said) == (name != "line"), name
        assert len(said) < 1000


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../b.safetensors"])
def test_shards_lie_in_the_folder_of_the_model(tmp_path: Path, name: str) -> None:
    tiny = Tiny.make(tmp_path, "qwen2", shard="50KB")
    index = tmp_path / "instruct" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    tensor = min(content["weight_map"])
    content["weight_map"][tensor] = name
    index.write_text(json.dumps(content))
    with pytest.raises(RainError, match="its index names files outside of its folder") as caught:
        tiny.calibrate()
    assert name in str(caught.value)
