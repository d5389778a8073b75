"""Merged models of the board's rows, each made once by mergekit as `mergekit-yaml` does."""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import calibrate
from rain_mergekit.config.merge_config import read_config
from rain_mergekit.merge_method.method import register
from testbed.language.recipes import Config, Row
from testbed.language.sets import LINES

LOG = logging.getLogger(__name__)
RANDOM_SEED = 0  # dare


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def configuration(row: Row, strength: float, trio: Path, work: Path) -> Config:
    """The whole merge configuration; a rain row is calibrated where that has not been done."""
    made = row.recipe(trio, strength)
    if not row.rain:
        return made
    described = digest([digest_of_sets(trio), row.samples.described])
    sets = row.samples.write(trio, work / f"sets-{described}")
    made["rain"] = {**sets, **{key: value for key, value in row.rain.items() if key}}
    models = [made["merge_method"], made["base_model"], *(m["model"] for m in made["models"])]
    path = work / f"calibration-{digest([described, made['rain'], models])}.safetensors"
    made["parameters"]["calibration"] = str(path)
    if not path.exists():
        write_calibration(made, path)
    return made


def write_calibration(made: Config, path: Path) -> None:
    """Calibrate what a configuration describes; it is kept beside the calibration file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".yml")
    written.write_text(yaml.safe_dump(made), encoding="utf-8")
    start = time.monotonic()
    calibrate(read_config(written), RunOptions(quiet=True))
    LOG.info("calibrated in %.0f s: %s", time.monotonic() - start, made["rain"])


def digest_of_sets(trio: Path) -> str:
    """Digest of the lines that rows take their calibration sets from."""
    found = hashlib.sha256()
    for kind in LINES:
        found.update((trio / f"{kind}.jsonl").read_bytes())
    return found.hexdigest()[:16]


def merged(config: Mapping[str, Any], out: Path) -> Path:
    """The merge, in a folder that is made anew."""
    register()
    shutil.rmtree(out, ignore_errors=True)
    options = MergeOptions(random_seed=RANDOM_SEED, write_model_card=False, quiet=True)
    run_merge(
        MergeConfiguration.model_validate(config),
        str(out),
        options=options,
        config_source=yaml.safe_dump(dict(config)),
    )
    return out
