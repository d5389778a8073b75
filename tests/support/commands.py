"""The `mergekit-rain` command on a one-layer cut of the packaged trio, with small sample sets."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hangs import HANGS
from safetensors.torch import load_file, save_file
from torch import Tensor

import rain_mergekit
from rain_mergekit.cli import cli

TRIO = Path(rain_mergekit.__file__).parent / "trio"
ROLES = ("reasoning", "instruct", "pretrained")
needs_rules = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="if-verifiable needs Python 3.11"
)
# As the console script, but with Ctrl-C as in a terminal, however the tests were started.
MAIN = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from rain_mergekit.cli import main; main()"
)


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, both outputs together, and stdout alone."""

    code: int
    output: str
    stdout: str


def run(*arguments: object, **options: Any) -> Outcome:
    """The command in this process; what it raises is a failure of the test."""
    result = CliRunner().invoke(cli, [str(item) for item in arguments], **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.output, result.stdout)


def run_process(*arguments: object, **options: Any) -> Outcome:
    """The command in its own process."""
    command = [sys.executable, "-c", MAIN, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=HANGS, **options
    )
    return Outcome(done.returncode, done.stdout + done.stderr, done.stdout)


def succeed(*arguments: object, **options: Any) -> str:
    outcome = run(*arguments, **options)
    assert outcome.code == 0, outcome.output
    return outcome.output


def everything(folder: Path) -> dict[str, int]:
    """All below a folder with the times of change, to see that nothing was left or touched."""
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} | {
        str(p): 0 for p in folder.rglob("*") if p.is_dir()
    }


def refused(folder: Path, *arguments: object) -> str:
    """The command fails with one clear message and leaves everything as it was."""
    before = everything(folder)
    outcome = run(*arguments)
    assert outcome.code == 1, outcome.output
    assert "Traceback" not in outcome.output, outcome.output
    lines = [line for line in outcome.output.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1, outcome.output
    assert everything(folder) == before
    return outcome.output[outcome.output.index("Error:") :]


@dataclass
class Workplace:
    """A folder with three models, two sample sets and one configuration."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def yaml(self) -> Path:
        return self.folder / "config.yml"

    @property
    def calibration(self) -> Path:
        return Path(self.config["parameters"]["calibration"])

    def model(self, role: str) -> Path:
        return self.folder / role

    def write(self, **changes: Any) -> Path:
        """Write the configuration; `rain` and `parameters` are updated, None removes an entry."""
        content = copy.deepcopy(self.config)
        for section in ("rain", "parameters"):
            if isinstance(changes.get(section), Mapping):
                changes[section] = {**content[section], **changes[section]}
        content.update(changes)
        kept = {key: value for key, value in content.items() if value is not None}
        self.yaml.write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
        return self.yaml

    def change_weights(self, role: str, change: Callable[[dict[str, Tensor]], None]) -> None:
        path = self.model(role) / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})

    def change_json(self, role: str, name: str, **changes: Any) -> None:
        path = self.model(role) / name
        content = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps(content))

    def write_samples(self, name: str, samples: list[dict[str, Any]]) -> Path:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        return path

    def samples(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder / f"{name}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def make_models(folder: Path, layers: int = 1) -> Path:
    """The trio's first layers as three checkpoints of their own."""
    for role in ROLES:
        shutil.copytree(TRIO / role, folder / role)
        config = json.loads((TRIO / role / "config.json").read_text())
        kinds = config["layer_types"][:layers]
        config = {**config, "num_hidden_layers": layers, "layer_types": kinds}
        (folder / role / "config.json").write_text(json.dumps(config))
        weights = load_file(TRIO / role / "model.safetensors")
        kept = {
            name: tensor
            for name, tensor in weights.items()
            if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
        }
        save_file(kept, folder / role / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_workplace(folder: Path, models: Path, samples: int = 6) -> Workplace:
    """Copies of the models, the first samples of both sets, and the configuration over them."""
    for role in ROLES:
        shutil.copytree(models / role, folder / role)
    for name in ("reasoning", "instruction"):
        lines = (TRIO / f"{name}.jsonl").read_text().splitlines()[:samples]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    config = {
        "merge_method": "rain",
        "base_model": str(folder / "reasoning"),
        "models": [
            {"model": str(folder / role), "parameters": {"role": role}}
            for role in ("instruct", "pretrained")
        ],
        "parameters": {"calibration": str(folder / "trio.rain.safetensors"), "lambda": 1.0},
        "dtype": "bfloat16",
        "rain": {
            "reasoning_data": str(folder / "reasoning.jsonl"),
            "instruction_data": str(folder / "instruction.jsonl"),
            "fit": "projection",
        },
    }
    place = Workplace(folder, config)
    place.write()
    return place
