"""What makes the repository's Markdown a site: README is its home page.

The pages are written to be read in the repository. Links from them to other files there (data,
configurations) would lead nowhere on the site, so that their text stays and the link goes.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Links, and of the page that moves pictures too.
_ANY = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add README.md as index.md, with its links as seen from docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=_moved(text)))
    return files


def _moved(text: str) -> str:
    """Links of a page that moves from the root of the repository into docs/."""

    def change(match: re.Match[str]) -> str:
        target = match["target"]
        if "://" not in target:
            target = posixpath.relpath(target, "docs")
        return f"[{match['text']}]({target}{match['anchor'] or ''})"

    return _ANY.sub(change, text)


def on_page_markdown(markdown: str, *, page: Any, files: Files, **_: Any) -> str:
    """Keep the text of a link that leads out of docs/; README is index.md here."""
    folder = posixpath.dirname(page.file.src_uri)

    def change(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match["target"]))
        if "://" in match["target"] or files.get_file_from_path(target) is not None:
            return match[0]
        if target == "../README.md":
            return f"[{match['text']}](index.md{match['anchor'] or ''})"
        assert (ROOT / "docs" / target).exists(), f"a link to {target}, which is not there"
        return match["text"]

    return _LINK.sub(change, markdown)
