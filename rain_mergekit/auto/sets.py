"""Which calibration sets fit the models: the user's, those of the package, or the model's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rain_mergekit.auto.request import Request
from rain_mergekit.data_building.output import write_samples
from rain_mergekit.errors import RainError
from rain_mergekit.publish.layout import HELD_OUT, INSTRUCTION, REASONING
from rain_mergekit.system.evenly_spaced import evenly_spaced
from rain_mergekit.system.json_samples import read_samples
from rain_mergekit.system.shipped_files import shipped

PACKAGED = shipped("calibration")
# Known tokenizers give all of a text back and have a token for three or four characters of English;
# one made for something else loses it, or takes it letter by letter.
_READABLE, _PER_TOKEN = 0.98, 2.0
_PROBED = 8
_ASIDE, _LEAST = 8, 24  # samples kept aside for measuring, of sets with at least so many


@dataclass(frozen=True)
class Sets:
    """Paths of both sets, and whether the reasoning set is the package's."""

    reasoning: str
    instruction: str
    packaged: bool


def choose_sets(request: Request, tokenizer: PreTrainedTokenizerBase, name: str) -> Sets:
    """What the request names, else the package's; RainError if the tokenizer is not for these."""
    reasoning = request.reasoning_data or str(PACKAGED / "reasoning.jsonl")
    instruction = request.instruction_data or str(PACKAGED / "instruction.jsonl")
    missing = [
        option
        for option, given in (
            ("--instruction-data", request.instruction_data),
            ("--reasoning-data or --prompts", request.reasoning_data or request.prompts or None),
        )
        if given is None
    ]
    if missing and not knows(tokenizer, _texts(PACKAGED / "reasoning.jsonl")):
        raise RainError(
            f"{name}: its tokenizer does not know the English of the calibration sets of the "
            f"package; give {' and '.join(missing)}"
        )
    return Sets(reasoning, instruction, request.reasoning_data is None)


def _texts(path: Path) -> list[str]:
    samples: list[Any] = read_samples(path, lambda _source, value: value)[1]
    return [str(sample["response"]) for sample in samples[:_PROBED]]


def knows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> bool:
    """Whether decoding gives most of the texts back, and a token stands for several characters."""
    whole = kept = characters = tokens = 0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        back = str(tokenizer.decode([i for i in ids if i != tokenizer.unk_token_id]))
        wanted, got = _grams(text), _grams(back)
        whole += sum(wanted.values())
        kept += sum((wanted & got).values())
        characters, tokens = characters + len(text), tokens + len(ids)
    return kept >= _READABLE * whole and characters >= _PER_TOKEN * tokens


def _grams(text: str) -> Counter[str]:
    """All runs of three characters, white space aside."""
    plain = "".join(text.split())
    return Counter(plain[i : i + 3] for i in range(len(plain) - 2))


def lay_out(sets: Sets, out: Path) -> None:
    """Copy both sets into the folder of the result; a large one has some samples kept aside.

    What is there stays: a continued run has the same samples.
    """
    samples: list[Any] = read_samples(sets.reasoning, lambda _source, value: value)[1]
    aside = _aside(len(samples))
    parts = {
        REASONING: [one for i, one in enumerate(samples) if i not in aside],
        HELD_OUT: [samples[index] for index in sorted(aside)],
        INSTRUCTION: read_samples(sets.instruction, lambda _source, value: value)[1],
    }
    for name, members in parts.items():
        if members and not (out / name).exists():
            write_samples(str(out / name), members)


def _aside(count: int) -> set[int]:
    """The indices of samples that are kept for measuring, out of `count`."""
    return set(evenly_spaced(range(count), _ASIDE)) if count >= _LEAST else set()
