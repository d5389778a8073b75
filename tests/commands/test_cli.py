"""The commands as a user calls them: what they do, say, and leave."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from commands import (
    Workplace,
    make_models,
    make_workplace,
    refused,
    run,
    run_process,
    succeed,
)
from forks import Ended, Forks, wait_for_stop
from mergekit.options import MergeOptions
from safetensors.torch import load_file

import rain_mergekit
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.writer import write_calibration
from rain_mergekit.cli import cli
from rain_mergekit.commands.console import duration, size
from rain_mergekit.commands.merge import merge as merge_command


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def place(tmp_path: Path, models: Path) -> Workplace:
    return make_workplace(tmp_path, models)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, models: Path) -> tuple[Workplace, str]:
    """A workplace with its calibration, and what the command said; not to be changed."""
    place = make_workplace(tmp_path_factory.mktemp("calibrated"), models)
    return place, succeed("calibrate", place.yaml)


@pytest.fixture
def ready(tmp_path: Path, calibrated: tuple[Workplace, str]) -> Workplace:
    """The same files and the same paths' content, in a folder of its own."""
    source = calibrated[0]
    place = make_workplace(tmp_path, source.folder)
    shutil.copy2(source.calibration, place.calibration)
    return place


# Help, version, output


def test_help_does_not_import_torch() -> None:
    script = (
        "import sys; from rain_mergekit.cli import cli; cli(['--help'], standalone_mode=False); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)  # noqa: PLW1510
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("calibrate", "merge", "verify", "demo", "Exit codes: 0 done"):
        assert text in done.stdout


@pytest.mark.parametrize("command", ["calibrate", "merge", "verify", "demo"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    text = succeed(command, "--help")
    assert f"Example:\n    mergekit-rain {command}" in text


def test_version() -> None:
    assert succeed("--version").strip().endswith(rain_mergekit.__version__)


@pytest.mark.parametrize(("option", "shown"), [("", False), ("-Wdefault", True)])
def test_what_libraries_announce_is_for_developers(option: str, shown: bool) -> None:
    """As the console script: no user can do anything about a call that will be gone one day."""
    script = (
        "import sys, warnings; from rain_mergekit import cli; sys.argv = ['mergekit-rain', '-h']\n"
        "try: cli.main()\n"
        "except SystemExit: warnings.warn('gone in 5.40', FutureWarning)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
    command = [sys.executable, *filter(None, [option]), "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ("gone in 5.40" in done.stderr) == shown


def test_unknown_command_and_wrong_option_are_usage_errors(place: Workplace) -> None:
    assert run("calibrat", place.yaml).code == 2
    for option in (("--activation-budget", "lots"), ("--device", "mps"), ("--dtype", "int8")):
        outcome = run("calibrate", place.yaml, *option)
        assert outcome.code == 2
        assert option[0] in outcome.output


def test_calibrate_says_what_it_did(calibrated: tuple[Workplace, str]) -> None:
    place, said = calibrated
    assert f"Wrote {place.calibration}" in said
    assert "1 layer, " in said
    assert "mean rank" in said
    assert "kept energy 0.9" in said
    assert "reasoning samples: 6 of 6 used" in said
    assert "instruction samples: 6 of 6 used" in said
    assert said.splitlines()[-1] == f"Next: mergekit-yaml {place.yaml} ./merged"
    assert "Warning" not in said
    assert "it/s" not in said  # no progress bar: nobody is watching


def test_skipped_samples_are_reported_with_their_reasons(place: Workplace) -> None:
    reasoning, instruction = place.samples("reasoning"), place.samples("instruction")
    reasoning[1]["output"] = reasoning[1]["output"].replace("</think>", "")
    spans = instruction[2]["related_prompt_list"][0]
    spans["response_spans"] = ["not there"]
    long = max(reasoning, key=lambda sample: len(sample["output"]))
    long["output"] = long["output"].replace("</think>", "a add 1 is two . " * 20 + "</think>")
    place.write_samples("reasoning", reasoning)
    place.write_samples("instruction", instruction)
    said = succeed("calibrate", place.write(rain={"max_tokens": 120}))
    assert "reasoning samples: 4 of 6 used" in said
    assert "the block is not closed by '</think>'" in said
    assert "more than max_tokens = 120" in said
    assert "instruction samples: 5 of 6 used" in said
    assert "the response does not contain the span 'not there'" in said


def test_rank_cap_is_a_warning(place: Workplace) -> None:
    said = succeed("calibrate", place.write(rain={"max_rank": 2}))
    assert said.count("Warning:") == 1
    assert "reached the rank cap" in said


def test_quiet_says_nothing(place: Workplace) -> None:
    assert succeed("calibrate", place.yaml, "--quiet") == ""
    assert succeed("merge", place.yaml, place.folder / "out", "--quiet") == ""


def test_colour_only_where_it_is_wanted(ready: Workplace) -> None:
    out = ready.folder / "out"
    assert "\x1b[" in succeed("merge", ready.yaml, out, color=True)
    assert "\x1b[" not in succeed("merge", ready.yaml, out)
    assert "\x1b[" not in succeed("merge", ready.yaml, out, color=True, env={"NO_COLOR": "1"})


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (5 << 30, "5.0 GiB")],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (185.4, "3 min 5 s"), (7810, "2 h 10 min")]
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_what_an_input_says_cannot_steer_the_terminal(tmp_path: Path) -> None:
    """Neither in the error nor in what comes before it; `\\e` is YAML for the escape character."""
    path = tmp_path / "config.yml"
    path.write_text(
        'merge_method: rain\nbase_model: "/none/\\e[2Jmodel"\nmodels:\n'
        "- {model: /none/i, parameters: {role: instruct}}\n"
        "- {model: /none/b, parameters: {role: pretrained}}\n"
        "parameters: {calibration: ./c.rain.safetensors}\n"
        "rain: {reasoning_data: r.jsonl, instruction_data: i.jsonl}\n"
    )
    said = refused(tmp_path, "calibrate", path)
    assert "/none/\\x1b[2Jmodel" in said
    assert "\x1b" not in said


# merge


def test_merge_equals_calibrate_and_mergekit_yaml_bit_for_bit(
    calibrated: tuple[Workplace, str], tmp_path: Path
) -> None:
    place = calibrated[0]
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(place.yaml)]
    subprocess.run([*command, str(tmp_path / "two"), "--quiet"], check=True, capture_output=True)
    one_yaml = tmp_path / "one.yml"
    parameters = {**place.config["parameters"], "calibration": str(tmp_path / "one.safetensors")}
    one_yaml.write_text(yaml.safe_dump({**place.config, "parameters": parameters}))
    said = succeed("merge", one_yaml, tmp_path / "one")
    assert f"Calibration needed: {tmp_path / 'one.safetensors'} does not exist" in said
    one, two = tmp_path / "one", tmp_path / "two"
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    succeed("finish", two)  # else its config.json is in the installed transformers' dialect
    assert (one / "config.json").read_bytes() == (two / "config.json").read_bytes()
    assert (one / "mergekit_config.yml").read_text() == one_yaml.read_text()
    assert "# one" in (one / "README.md").read_text()  # the card's title is the folder's name


def test_second_run_does_not_calibrate_again(ready: Workplace) -> None:
    # Another folder holds the same models and data, so their paths must not matter.
    before = ready.calibration.read_bytes()
    said = succeed("merge", ready.yaml, ready.folder / "out")
    assert f"{ready.calibration} is up to date: not calibrated again" in said
    assert ready.calibration.read_bytes() == before
    ready.write(parameters={"lambda": 0.5})
    assert "up to date" in succeed("merge", ready.yaml, ready.folder / "half")
    whole = load_file(ready.folder / "out" / "model.safetensors")
    half = load_file(ready.folder / "half" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not whole[name].equal(half[name])


def test_recalibrate_on_demand(ready: Workplace) -> None:
    said = succeed("merge", ready.yaml, ready.folder / "out", "--recalibrate")
    assert f"Wrote {ready.calibration}" in said


def change_setting(place: Workplace) -> str:
    place.write(rain={"window": 4, "rank_share": 0.9})
    return "rain.window is 4, was 5|rain.rank_share is 0.9, was 0.99"


def change_data(place: Workplace) -> str:
    place.write_samples("reasoning", place.samples("reasoning")[:4])
    return f"rain.reasoning_data: the content of {place.folder / 'reasoning.jsonl'} has changed"


def change_model(place: Workplace) -> str:
    succeed("calibrate", place.yaml)  # so that it records the models of this folder
    place.change_weights("instruct", lambda weights: weights["model.norm.weight"].mul_(2))
    return f"the instruct model {place.model('instruct')} has changed (weights)"


def change_base(place: Workplace) -> str:
    other = place.folder / "other"
    shutil.copytree(place.model("reasoning"), other)
    place.config["base_model"] = str(other)
    (other / "config.json").write_text(
        (other / "config.json").read_text().replace('"rope_theta": 10000.0', '"rope_theta": 9999.0')
    )
    place.write()
    return f"the reasoning model is {other}, was "


def forget_setting(place: Workplace) -> str:
    """As of a version that did not have the setting yet."""
    file = CalibrationFile.open(place.calibration)
    header, tensors = json.loads(json.dumps(file.header)), load_file(place.calibration)
    file.close()
    del header["settings"]["reading_share"]
    write_calibration(place.calibration, header, tensors)
    return "rain.reading_share is 0.9, and the file was written before this setting existed"


def truncate(place: Workplace) -> str:
    place.calibration.write_bytes(place.calibration.read_bytes()[:-100])
    return "truncated"


def cut_header(place: Workplace) -> str:
    place.calibration.write_bytes(place.calibration.read_bytes()[:500])
    return "cut off inside its header"


def alter(place: Workplace) -> str:
    content = bytearray(place.calibration.read_bytes())
    content[-5] ^= 1
    place.calibration.write_bytes(bytes(content))
    return "was altered"


def empty(place: Workplace) -> str:
    place.calibration.write_bytes(b"")
    return "not a safetensors file"


@pytest.mark.parametrize(
    "change",
    [
        change_setting,
        change_data,
        change_model,
        change_base,
        forget_setting,
        truncate,
        cut_header,
        alter,
        empty,
    ],
)
def test_calibration_of_something_else_is_replaced_and_the_difference_named(
    ready: Workplace, change: Callable[[Workplace], str]
) -> None:
    expected = change(ready)
    said = succeed("merge", ready.yaml, ready.folder / "out")
    reasons = [line for line in said.splitlines() if line.startswith("Calibration needed: ")]
    assert len(reasons) == len(expected.split("|"))
    for text, line in zip(expected.split("|"), reasons, strict=True):
        assert text in line
    assert "up to date" in succeed("merge", ready.yaml, ready.folder / "out")


def test_missing_data_cannot_be_compared_and_is_no_obstacle(ready: Workplace) -> None:
    (ready.folder / "instruction.jsonl").unlink()
    said = succeed("merge", ready.yaml, ready.folder / "out")
    assert said.count("Warning:") == 1
    assert "instruction.jsonl not found; cannot check whether it changed" in said
    assert "up to date" in said


def test_works_where_auto_loading_is_off(ready: Workplace) -> None:
    off = {**os.environ, "RAIN_MERGEKIT_AUTOLOAD": "0", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    outcome = run_process("merge", ready.yaml, ready.folder / "out", env=off)
    assert outcome.code == 0, outcome.output
    assert (ready.folder / "out" / "config.json").exists()


def test_every_option_of_mergekit_yaml_is_there_once() -> None:
    names = [parameter.name for parameter in merge_command.params]
    flags = [flag for p in merge_command.params for flag in (*p.opts, *p.secondary_opts)]
    assert set(MergeOptions.model_fields) <= set(names)
    assert len(set(names)) == len(names)
    assert len(set(flags)) == len(flags)


def test_options_reach_mergekit_and_old_shards_do_not_stay(ready: Workplace) -> None:
    out = ready.folder / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    succeed("merge", ready.yaml, out, "--out-shard-size", "300K", "--no-write-model-card")
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    assert not (out / "README.md").exists()
    succeed("merge", ready.yaml, out)
    assert [path.name for path in out.glob("model*")] == ["model.safetensors"]
    assert (out / "notes.txt").read_text() == "mine"


# Interruptions


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


def interrupt(forks: Forks, number: signal.Signals, *arguments: object) -> Ended:
    """Start the command, and send a signal in the first layer: it waits for that."""
    pid = forks.start(*arguments, "--quiet", stop_at="layer-00000.safetensors")
    assert wait_for_stop(pid)
    os.kill(pid, number)
    os.kill(pid, signal.SIGCONT)
    return forks.wait()


def test_interrupted_calibration(place: Workplace, forks: Forks) -> None:
    before = sorted(place.folder.rglob("*"))
    ended = interrupt(forks, signal.SIGINT, "calibrate", place.yaml)
    assert ended.code == 130, ended.output
    assert ended.output.strip().splitlines() == ["Interrupted: nothing was written"]
    assert sorted(place.folder.rglob("*")) == before


def test_terminated_merge(place: Workplace, forks: Forks) -> None:
    before = sorted(place.folder.rglob("*"))
    ended = interrupt(forks, signal.SIGTERM, "merge", place.yaml, place.folder / "deep" / "out")
    assert ended.code == 143, ended.output
    assert "Traceback" not in ended.output
    assert sorted(place.folder.rglob("*")) == before


def test_interruption_that_says_nothing(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_path: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rain_mergekit.config.merge_config.read_config", interrupted)
    outcome = run("calibrate", place.yaml)
    assert (outcome.code, outcome.output) == (130, "Interrupted\n")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
    ids=["python", "gpu", "cpu"],
)
def test_out_of_memory_is_one_line(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(_path: object) -> None:
        raise error

    monkeypatch.setattr("rain_mergekit.config.merge_config.read_config", fails)
    outcome = run("calibrate", place.yaml)
    assert outcome.code == 1
    assert outcome.output.startswith("Error: out of memory in calibrate")
    assert ": take a smaller --activation-budget" in outcome.output


def test_group_knows_all_its_commands() -> None:
    context = cli.make_context("mergekit-rain", ["--help"], resilient_parsing=True)
    for name in cli.list_commands(context):
        assert cli.get_command(context, name) is not None
