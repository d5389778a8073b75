"""One model on one list of prompts: what it says, and how far it is from the reasoning model."""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from rain_mergekit.evaluation.divergence_meter import DivergenceMeter
from rain_mergekit.text.calibration_sets import load_reasoning
from rain_mergekit.text.token_positions import ReasoningTokens
from testbed.judging.divergence import checkpoint, meter
from testbed.judging.intervals import Ratio
from testbed.language.scoring import numbers, score, split
from testbed.models.generation import Output, generate
from testbed.models.loading import load_model, load_tokenizer
from testbed.puzzles.records import Record, read_lines, write_lines

DTYPE = "bfloat16"  # of the products while a model speaks; its weights are bfloat16 always
TEXTS = 64  # of the prompts, evenly spaced, on which L_think is measured


class Judge:
    """The prompts of one file and the reasoning model's view of the markers in right texts."""

    def __init__(
        self,
        reasoning: Path,
        prompts: Path,
        *,
        divergence: bool = True,
        plain: int | None = None,
        every: int = 1,
        dtype: str = DTYPE,
    ) -> None:
        """Which prompts are used: each so-manieth, and of those without a constraint `plain`."""
        found = read_lines(prompts)[::every]
        without = [record for record in found if not record["constraints"]][:plain]
        self.records = [*(record for record in found if record["constraints"]), *without]
        part = "" if plain is None else f", {plain} plain"
        part += "" if every == 1 else f", one in {every}"
        part += "" if dtype == DTYPE else f", {dtype}"
        self.digest = hashlib.sha256(prompts.read_bytes()).hexdigest()[:16] + part
        self._reasoning = reasoning
        self._divergent = divergence
        self._dtype = getattr(torch, dtype)

    @cached_property
    def _texts(self) -> Sequence[ReasoningTokens]:
        return _marked(self.records, load_tokenizer(self._reasoning))

    @cached_property
    def _meter(self) -> DivergenceMeter:
        return meter(self._reasoning, self._texts)

    def measure(self, folder: Path) -> dict[str, Any]:
        """All numbers of one model."""
        return self._judged(self._said(folder), self._divergence(folder))

    def ceiling(self, instruct: Path, reasoning: Sequence[Output]) -> dict[str, Any]:
        """The instruct model goes on where the reasoning model's thinking ends."""
        heads = [split(output.text).head for output in reasoning]
        after = self._said(instruct, heads)
        joined = [
            Output(head + output.text, output.tokens, output.ended)
            for head, output in zip(heads, after, strict=True)
        ]
        return self._judged(joined, {})

    def _said(self, folder: Path, given: Sequence[str] | None = None) -> list[Output]:
        """The model's reply to each prompt, after its earlier turns and what is given of it."""
        model, tokenizer = load_model(folder).to(self._dtype), load_tokenizer(folder)
        prompts = [record["prompt"] for record in self.records]
        before = [record.get("before", []) for record in self.records]
        return generate(model, tokenizer, prompts, given, before=before)

    def _judged(self, outputs: Sequence[Output], more: dict[str, Ratio]) -> dict[str, Any]:
        pairs = zip(self.records, outputs, strict=True)
        scores = [score(record, o.text, o.tokens, o.ended) for record, o in pairs]
        found = numbers(self.records, scores, more)
        return {**found, "prompts": self.digest, "outputs": [o.text for o in outputs]}

    def _divergence(self, folder: Path) -> dict[str, Ratio]:
        """Mean KL(reasoning model ‖ model) of the next token at the think positions."""
        if not self._divergent:
            return {}
        values, weights = np.zeros(len(self.records)), np.zeros(len(self.records))
        every = _spaced(len(self.records))
        apart = self._meter.divergences(checkpoint(folder))
        for index, text, found in zip(every, self._texts, apart, strict=True):
            values[index] = float(found[list(text.think_positions)].sum())
            weights[index] = len(text.think_positions)
        return {"L_think": Ratio(values, weights)}


def _spaced(count: int) -> list[int]:
    return sorted({round(i * (count - 1) / (TEXTS - 1)) for i in range(TEXTS)})


def _marked(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerFast
) -> tuple[ReasoningTokens, ...]:
    """Token ids up to the close marker and the think positions, as the calibration finds them."""
    chosen = [records[index] for index in _spaced(len(records))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.jsonl"
        write_lines(path, ({"prompt": r["prompt"], "output": r["output"]} for r in chosen))
        samples = load_reasoning(path, tokenizer).samples
    if len(samples) != len(chosen):
        raise ValueError("some of the right texts cannot be used")
    return samples


def model_digest(folder: Path) -> str:
    """Digest of a model's weights and of how it reads its prompt."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        found.update(path.read_bytes())
    for name in ("tokenizer.json", "chat_template.jinja"):
        found.update((folder / name).read_bytes() if (folder / name).exists() else b"")
    return found.hexdigest()[:16]


def cached(path: Path, key: dict[str, Any], make: Any) -> dict[str, Any]:
    """The row in the file if it was made from the same things, else a new one, written there."""
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found.get("key") == key:
            return found
    row = {"key": key, **make()}
    write_json(path, row)
    return row


def write_json(path: Path, found: Mapping[str, Any]) -> None:
    """The results, at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
