"""The table of docs/architectures.md of what a result's folder holds, made from two merges.

`python tests/support/folder_table.py` writes it.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml
from commands import succeed
from merging import merge
from published import published
from tiny import read_weights

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
START, END = "<!-- files -->\n", "<!-- end of files -->\n"
HEAD = (
    "| in the reasoning model's folder | after `mergekit-yaml` | "
    "after `mergekit-rain merge`, or `mergekit-rain finish` |\n|---|---|---|\n"
)
# What stands for many files of its kind.
KINDS = {
    "SYSTEM_PROMPT.txt": ", every other `*.txt`, `*.json`, `*.jinja`, `*.model`",
    "reasoning_parser.py": ", every other `*.py`: a model's own code, a server's parser",
    "qwen.tiktoken": ", every other `*.tiktoken`",
    "additional_chat_templates/tool_use.jinja": ", every other template there",
    "model.safetensors": ", or its shards, or `pytorch_model.bin`",
    "model.gguf": ", other formats of the weights",
}


def rows(folder: Path) -> Iterator[str]:
    """One line for each file of a reasoning model's folder that holds all kinds of them."""
    _, config = published(folder, "olmo2")
    succeed("merge", config, folder / "ours")
    stock = merge(folder / "stock", yaml.safe_load(config.read_text())).folder
    own = folder / "reasoning"
    for name in sorted(p.relative_to(own).as_posix() for p in own.rglob("*") if p.is_file()):
        held = [what_is_held(own / name, out / name) for out in (stock, folder / "ours")]
        yield f"| `{name}`{KINDS.get(name, '')} | {held[0]} | {held[1]} |\n"


def what_is_held(own: Path, found: Path) -> str:
    """What a result has under the name of a file of the reasoning model."""
    if own.suffix == ".safetensors":  # one more file where tensors were added
        missing = read_weights(own.parent).keys() - read_weights(found.parent).keys()
        return "merged, without those that no class knows" if missing else "merged, all tensors"
    if not found.exists():
        return "-"
    if found.read_bytes() == own.read_bytes():
        return "copied"
    if found.name == "config.json":
        same = json.loads(found.read_text()) == json.loads(own.read_text())
        return "the same, key for key" if same else "written anew"
    return "mergekit's"


def page(text: str) -> str:
    """The page with its table replaced."""
    with tempfile.TemporaryDirectory() as folder:
        table = START + HEAD + "".join(rows(Path(folder))) + END
    return re.sub(f"{re.escape(START)}.*{re.escape(END)}", lambda _: table, text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
