"""Make the models of the scoreboard: calibrate, merge with stock mergekit, load, judge."""

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import AutoConfig

from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import calibrate
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.config.merge_config import read_config
from rain_mergekit.merge_method.method import register
from rain_mergekit.text.token_positions import InstructionTokens
from testbed.board.attention import Scores, attention_scores, held_samples
from testbed.board.controls import edited
from testbed.board.methods import Method
from testbed.board.recipes import ROLES, rain_config
from testbed.judging.judge import Judge, chosen
from testbed.models.loading import load_tokenizer
from testbed.puzzles.records import read_lines

LOG = logging.getLogger(__name__)
RANDOM_SEED = 0


def digest(trio: Path) -> str:
    """Of the three models and all prompts and samples: results of others are not theirs."""
    files = [trio / role / "model.safetensors" for role in ROLES]
    found = hashlib.sha256()
    for path in [*files, *sorted(trio.glob("*.jsonl"))]:
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]


class Bench:
    """One trio, and a folder for what is made on the way."""

    uncalibrated: Sequence[str] = ()  # constraints that no calibration text shows

    def __init__(self, trio: Path, folder: Path) -> None:
        register()
        self.trio, self._folder = trio, folder
        self._shape = AutoConfig.from_pretrained(trio / "reasoning")
        self._voices = {role: load_tokenizer(trio / role) for role in ROLES}
        self._held: Sequence[InstructionTokens] | None = None
        self._judges: dict[tuple[str, int | None], Judge] = {}
        self.calibrations: dict[str, dict[str, Any]] = {}

    def judge(self, split: str, limit: int | None) -> Judge:
        """The judge of a split's first prompts; made once."""
        if (split, limit) not in self._judges:
            prompts = chosen(read_lines(self.trio / f"{split}.jsonl"), limit)
            voice = self._voices["reasoning"]
            judge = Judge(self.trio / "reasoning", voice, prompts, self.uncalibrated)
            self._judges[split, limit] = judge
        return self._judges[split, limit]

    def measure(
        self, method: Method, strength: float, split: str, limit: int | None
    ) -> dict[str, Any]:
        """Numbers of one merge; with the CPU seconds that making and judging it took."""
        start = time.process_time()
        with self._model(method, strength) as (model, voice):
            made = time.process_time()
            found = self.judge(split, limit).measure(model, self._voices[voice])
            seconds = {"making": made - start, "judging": time.process_time() - made}
        return {**found, "cpu_seconds": {k: round(v, 1) for k, v in seconds.items()}}

    def attention(self, method: Method, strength: float) -> Scores:
        """The instruction-attention score of each layer of one merge, or of a model of the trio."""
        if self._held is None:
            self._held = held_samples(self.trio)
        if method.name in ROLES:
            return attention_scores(self.trio / method.name, self._held)
        with self._made(self._config(method, strength)) as folder:
            return attention_scores(folder, self._held)

    @contextmanager
    def _model(self, method: Method, strength: float) -> Iterator[tuple[Path, str]]:
        """The folder of one merge, or of a model of the trio, and whose template it speaks."""
        if method.name in ROLES:
            yield self.trio / method.name, method.name
            return
        with self._made(self._config(method, strength)) as folder:
            yield folder, "reasoning"

    def _config(self, method: Method, strength: float) -> dict[str, Any]:
        if method.recipe is not None:
            return method.recipe(self.trio, strength)
        path = self.calibration(method)
        return rain_config(self.trio, path, strength, dtype=method.dtype)

    @contextmanager
    def _made(self, config: Mapping[str, Any]) -> Iterator[Path]:
        """What `mergekit-yaml` makes of the configuration."""
        with tempfile.TemporaryDirectory(dir=self._folder) as out:
            options = MergeOptions(
                random_seed=RANDOM_SEED, copy_tokenizer=False, write_model_card=False, quiet=True
            )
            run_merge(MergeConfiguration.model_validate(config), out, options)
            yield Path(out)

    def calibration(self, method: Method) -> Path:
        """The calibration file of a rain method: made once, then an edited copy if it asks."""
        settings = dict(method.settings or {})
        if method.head:
            tied = self._shape.tie_word_embeddings
            settings["lm_head"] = "unseen" if tied else "all"
        if settings.get("rank_by") == "full":  # all directions would leave nothing to merge
            settings["max_rank"] = self._shape.hidden_size - 1
        source = self._calibrated(settings)
        if method.edit is None:
            self._describe(method.name, source)
            return source
        target = source.with_name(f"{source.stem}-{method.edit.replace(' ', '-')}.safetensors")
        return target if target.exists() else edited(source, target, method.edit, self.trio)

    def _calibrated(self, settings: Mapping[str, Any]) -> Path:
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        path = self._folder / f"{name}.safetensors"
        if not path.exists():
            config = rain_config(self.trio, path, 1.0, settings)
            path.with_suffix(".yml").write_text(yaml.safe_dump(config), encoding="utf-8")
            start = time.process_time()
            calibrate(read_config(path.with_suffix(".yml")), RunOptions(quiet=True))
            LOG.info("calibrated %s, %.0f CPU s", settings, time.process_time() - start)
        return path

    def _describe(self, name: str, path: Path) -> None:
        file = CalibrationFile.open(path)
        sites = file.header["sites"].values()
        file.close()
        ranks = [site["rank"] for site in sites]
        if not ranks:  # of stream matching, whose changes have ranks instead
            return
        self.calibrations[name] = {
            "mean_rank": sum(ranks) / len(ranks),
            "capped": sum(site["capped"] for site in sites),
            "sites": len(ranks),
        }
