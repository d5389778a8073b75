"""What `mergekit-rain merge` puts back where mergekit builds the tokenizer anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import Workplace, make_models, make_workplace, succeed
from transformers import AutoTokenizer, PreTrainedTokenizerFast

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
TEXT = "five cups . a -6 .\n\n<think> b </think>"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("tokenizer")
    return make_workplace(folder / "place", make_models(folder / "models"), samples=4)


def merged(place: Workplace, name: str, **changes: Any) -> tuple[Path, str]:
    out = place.folder / name
    return out, succeed("merge", place.write(**changes), out)


def same_files(place: Workplace, out: Path) -> list[str]:
    return [
        n for n in FILES if (out / n).read_bytes() == (place.model("reasoning") / n).read_bytes()
    ]


def test_tokenizer_is_the_reasoning_models_own(place: Workplace) -> None:
    """mergekit alone would write another class, which knows none of the words."""
    out, said = merged(place, "base", tokenizer={"source": "base"})
    assert "Put back as the reasoning model has them: generation_config.json, tokenizer" in said
    assert same_files(place, out) == list(FILES)
    ours, theirs = (
        PreTrainedTokenizerFast.from_pretrained(folder)
        for folder in (place.model("reasoning"), out)
    )
    assert theirs(TEXT)["input_ids"] == ours(TEXT)["input_ids"]


def test_files_that_mergekit_copies_are_left(place: Workplace) -> None:
    out, said = merged(place, "plain")
    assert "Put back" not in said
    assert same_files(place, out) == list(FILES)


def test_template_of_the_configuration_stays(place: Workplace) -> None:
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    out, said = merged(place, "template", chat_template=template)
    assert same_files(place, out) == ["tokenizer.json", "tokenizer_config.json", FILES[-1]]
    assert AutoTokenizer.from_pretrained(out).chat_template == template
    assert "chat template is not" not in said


def test_larger_vocabulary_is_said_to_split_differently(place: Workplace) -> None:
    """One token more: the files cannot be the reasoning model's, the template can."""
    path = place.model("instruct") / "tokenizer.json"
    content, before = json.loads(path.read_text()), path.read_text()
    words, merges = content["model"]["vocab"], content["model"]["merges"]
    last = max(words, key=lambda word: words[word])
    words["pples"] = words.pop(last)
    content["model"]["merges"] = [m for m in merges if last not in (*m, "".join(m))]
    path.write_text(json.dumps(content))
    rain = {"accept": ["other_tokens", "no_thinking"]}
    out, said = merged(place, "union", tokenizer={"source": "union"}, rain=rain)
    path.write_text(before)
    assert same_files(place, out) == ["chat_template.jinja", "generation_config.json"]
    assert "splits text in another way than the reasoning model's" in said


def test_no_tokenizer_is_wanted(place: Workplace) -> None:
    out = place.folder / "bare"
    succeed("merge", place.write(), out, "--no-copy-tokenizer")
    assert not any((out / name).exists() for name in FILES)
