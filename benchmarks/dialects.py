"""Is a merge at lambda 0 the reasoning model, as transformers 4 and 5 load both?

    pip install --no-deps --target t4 \\
        transformers==4.57.1 tokenizers==0.22.1 huggingface_hub==0.36.0
    python -m benchmarks.dialects t4

Tiny random trios of many families are built and saved by transformers 4, merged by `mergekit-rain
merge` with the installed transformers, and loaded by both. One line a family; exit status 1 if one
differs, or cannot be compared and is not among `NOT_COMPARED`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[1]
ROLES = ("reasoning", "instruct", "pretrained")
# What cannot be compared, and why; of any other family that is a failure.
NOT_COMPARED = {
    "afmoe": "transformers 4.57 does not know it",
    "qwen3_5_text": "transformers 4.57 does not know it",
    "gpt_neox": "mergekit's table asks for buffers that no longer exist",
}
# In a process of its own: which transformers is imported is decided by PYTHONPATH.
_MAKE = """
import json, sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
failed = {}
for family, options in json.load(sys.stdin).items():
    try:
        config = AutoConfig.for_model(family, **options)
        auto = AutoModelForImageTextToText if "vision_config" in options else AutoModelForCausalLM
        for number, role in enumerate(("reasoning", "instruct", "pretrained")):
            torch.manual_seed(number)
            model, folder = auto.from_config(config), Path(sys.argv[1], family, role)
            model.save_pretrained(folder)
            # Qwen2.5-VL puts its name into the part for texts, whereas published ones have it here.
            saved = json.loads((folder / "config.json").read_text())
            saved.setdefault("architectures", [type(model).__name__])
            (folder / "config.json").write_text(json.dumps(saved))
    except Exception as error:
        failed[family] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
print(json.dumps(failed))
"""
_COMPARE = """
import json, sys, torch, transformers
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
found = {}
for family in json.load(sys.stdin):
    folder, logits = Path(sys.argv[1], family), []
    try:
        config = json.loads((folder / "reasoning" / "config.json").read_text())
        auto = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
        for name in ("reasoning", "merged"):
            model = auto.from_pretrained(folder / name, dtype=torch.float32).eval()
            with torch.no_grad():
                logits.append(model(torch.arange(10, 60)[None], use_cache=False).logits)
        found[family] = float((logits[0] - logits[1]).abs().max())
    except Exception as error:
        found[family] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
        if not logits:
            found[family] = "cannot run the reasoning model itself: " + found[family]
print(json.dumps(found))
"""


def main() -> None:
    """Make, merge, load and compare; one line a family."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dialects", description=__doc__)
    parser.add_argument("transformers4", type=Path, help="folder of `pip install --target`")
    parser.add_argument("families", nargs="*", help="some families only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rain-dialects-") as name:
        folder = Path(name)
        old = str(options.transformers4.resolve())
        families = configs(options.families)
        failed = {f: f"not built: {e}" for f, e in child(_MAKE, folder, families, old).items()}
        for family in families.keys() - failed.keys():
            if problem := merged(folder / family):
                failed[family] = f"not merged: {problem}"
        done = sorted(families.keys() - failed.keys())
        results = [child(_COMPARE, folder, done, path) for path in (old, None)]
    wrong = [family for family in done if any(differs(one[family]) for one in results)]
    wrong += sorted(failed.keys() - NOT_COMPARED.keys())
    for family in families:
        if family in failed:
            print(f"{family:20} {failed[family]}")
        else:
            four, five = (one[family] for one in results)
            print(f"{family:20} transformers 4: {four}   transformers 5: {five}")
    print(f"{len(done)} families compared, {len(failed)} not; wrong: {', '.join(wrong) or 'none'}")
    sys.exit(1 if wrong or not done else 0)


def differs(found: float | str) -> bool:
    """Whether the two models differ, or only the merged one fails."""
    return found != 0.0 and not str(found).startswith("cannot run the reasoning model itself")


def configs(chosen: Sequence[str]) -> dict[str, Any]:
    """Arguments of a small config of each family, as transformers 4 takes them."""
    sys.path.insert(0, str(REPOSITORY / "tests" / "support"))
    from architectures import _BASE, FAMILIES  # noqa: PLC0415 - the tests' own list

    return {
        family: aged(options if "text_config" in options else {**_BASE, **options})
        for family, options in FAMILIES.items()
        if family in chosen or not chosen
    }


def aged(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a config with the rotary embedding's as transformers 4 calls them."""
    found = {
        name: aged(value) if name == "text_config" else value for name, value in options.items()
    }
    if (rope := found.pop("rope_parameters", None)) is not None:
        found["rope_theta"] = rope["rope_theta"]
        found["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return found


def child(code: str, folder: Path, given: Any, transformers: str | None) -> Mapping[str, Any]:
    """Run `code` with that transformers in front of the installed one, and read what it prints."""
    env = {**os.environ, "TRANSFORMERS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = transformers or ""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def merged(folder: Path) -> str | None:
    """Calibrate and merge at lambda 0 into `folder`/merged; the message if that is refused."""
    from click.testing import CliRunner  # noqa: PLC0415
    from tiny import make_tokenizer, write_sets  # noqa: PLC0415 - of tests/support

    from rain_mergekit.cli import cli  # noqa: PLC0415

    for role in ROLES:
        make_tokenizer().save_pretrained(folder / role)
    write_sets(folder)
    content = {
        "merge_method": "rain",
        "base_model": str(folder / "reasoning"),
        "models": [
            {"model": str(folder / role), "parameters": {"role": role}} for role in ROLES[1:]
        ],
        "parameters": {"calibration": str(folder / "c.rain.safetensors"), "lambda": 0.0},
        "rain": {
            "reasoning_data": str(folder / "reasoning.jsonl"),
            "instruction_data": str(folder / "instruction.jsonl"),
            "fit": "projection",
            "rank_by": "energy",
            "rank_share": 0.9,
            "accept": ["no_thinking", "large_task_vector"],
        },
    }
    (folder / "config.yml").write_text(yaml.safe_dump(content))
    done = CliRunner().invoke(cli, ["merge", str(folder / "config.yml"), str(folder / "merged")])
    if done.exit_code == 0:
        return None
    return str(done.exception) if done.exit_code != 1 else done.output.splitlines()[-1][:160]


if __name__ == "__main__":
    main()
