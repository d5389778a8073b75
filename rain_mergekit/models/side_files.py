"""The files beside a model's weights: which belong to the model, and copying them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from rain_mergekit.system.untrusted_input import read_regular

# What loaders, tokenizers, processors and servers read; a model's own code is read where trusted.
_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".spm", ".vocab", ".bpe", ".py")
_NESTED = (".jinja", ".py")
_TERMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
# config.json is written field by field; the others describe other weights, or how they were made.
_OTHER = (
    *("config.json", "params.json", "adapter_config.json", "rain_source.json"),
    *("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"),
)
TEMPLATES = ("chat_template.jinja", "chat_template.json")
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("tokenizer.model", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("tekken.json", "spiece.model"),
)
GENERATION = "generation_config.json"
# What mergekit does not fetch from the hub; code only where it may run.
HUB_PATTERNS = (
    *("*.jinja", "*.model", "*.txt", "*.tiktoken", "*.spm", "*.vocab", "*.bpe"),
    *(f"{name}*" for name in _TERMS),
)
HUB_CODE = ("*.py",)


def side_files(folder: str | Path) -> list[str]:
    """Paths, relative to the folder, of the files beside the weights that belong to the model.

    Links that lead out of the folder are left out, unless into the hub cache's own store: a folder
    that somebody else made must not name which of the user's files are copied.
    """
    root = Path(folder)
    return sorted(path.relative_to(root).as_posix() for path in _files(root) if _safe(root, path))


def model_card(folder: str | Path) -> bytes | None:
    """What its README.md says; None where there is none that `side_files` would allow."""
    path = Path(folder, "README.md")
    if not path.is_file() or not _safe(Path(folder), path):
        return None
    try:
        return read_regular(path)
    except OSError:
        return None


def is_of_tokenizer(name: str) -> bool:
    """Whether the file belongs to the tokenizer; chat templates do."""
    return (
        name in TOKENIZER
        or name in TEMPLATES
        or name.endswith(".tiktoken")
        or name.startswith("additional_chat_templates/")
    )


def copy_files(source: str | Path, target: str | Path, names: Iterable[str]) -> tuple[str, ...]:
    """Copy those of the named files that are there and differ; returns their names."""
    copied = []
    for name in names:
        ours, goal = Path(source, name), Path(target, name)
        if ours.is_file() and not same_file(source, target, name):
            goal.parent.mkdir(parents=True, exist_ok=True)
            goal.unlink(missing_ok=True)  # a link is replaced, not followed
            shutil.copyfile(ours, goal)
            copied.append(name)
    return tuple(copied)


def same_file(source: str | Path, target: str | Path, name: str) -> bool:
    """Whether both folders have the same file of that name, or neither has one."""
    ours, theirs = Path(source, name), Path(target, name)
    if ours.is_file() and theirs.is_file():
        return ours.read_bytes() == theirs.read_bytes()
    return not ours.is_file() and not theirs.is_file()


def _files(root: Path) -> Iterator[Path]:
    for path in root.iterdir():
        if path.name.startswith(".") or path.name.upper().startswith("README"):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from (p for p in path.rglob("*") if p.suffix in _NESTED and p.is_file())
        elif path.is_file() and _belongs(path.name):
            yield path


def _belongs(name: str) -> bool:
    if name in _OTHER or name.endswith(".index.json"):
        return False
    return name.endswith(_SUFFIXES) or name.upper().startswith(_TERMS)


def _safe(root: Path, path: Path) -> bool:
    found = path.resolve()
    inside = [root.resolve()]
    if root.parent.name == "snapshots":  # of the hub's cache: files are links into `blobs`
        inside.append(root.parent.parent.resolve() / "blobs")
    return any(found.is_relative_to(place) for place in inside)
