"""Fenced blocks of a Markdown page, with the comments that say what a test does with them.

`<!-- file: NAME -->` above a block: save it under that name before the next block runs.
`<!-- test: skip -->` above a block: it installs or downloads, and is not run.
`<!-- test: start with an empty folder -->` anywhere: the page prepares everything itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
EMPTY = "<!-- test: start with an empty folder -->"
_BLOCK = re.compile(
    r"^(?:<!-- (?P<comment>[^\n]*?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block; line is where its fence stands."""

    page: Path
    line: int
    language: str
    text: str
    file: str | None
    skip: bool

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All blocks of the page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        comment = match["comment"] or ""
        found.append(
            Block(
                page=page,
                line=text.count("\n", 0, match.start()) + 1,
                language=match["language"],
                text=match["text"],
                file=comment.removeprefix("file: ") if comment.startswith("file: ") else None,
                skip=comment == "test: skip",
            )
        )
    return found


def fences(page: Path) -> int:
    """How many lines are fences; twice the number of blocks if none was missed."""
    return len(re.findall(r"^\s*(?:```|~~~)", page.read_text(encoding="utf-8"), re.MULTILINE))
