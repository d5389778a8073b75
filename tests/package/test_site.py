"""The documentation as a site: it builds without a warning, and loads nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from doc_blocks import PAGES, ROOT
from hangs import HANGS

import rain_mergekit


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*command, "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Links(HTMLParser):
    """What a page loads, where it leads, and which anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.leads: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids.add(found.get("id", ""))
        if tag == "a":
            self.leads.append(found.get("href", ""))
        elif tag == "link" and found.get("rel") == "canonical":
            pass
        else:
            self.loads += [found[name] for name in ("src", "href") if name in found]


def test_every_page_is_there(site: Path) -> None:
    expected = {page.with_suffix(".html").name for page in PAGES if page.parent.name == "docs"}
    assert expected | {"index.html"} <= {page.name for page in site.glob("*.html")}
    assert "One YAML file drives everything" in (site / "index.html").read_text(encoding="utf-8")


def test_the_reference_has_every_public_name_with_its_docstring(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    found = Links(text).ids
    for name in set(rain_mergekit.__all__) - {"__version__"}:
        assert f"rain_mergekit.api.{name}" in found, name
        first = str(getattr(rain_mergekit, name).__doc__).partition("\n")[0]
        assert first.partition("`")[0] in unescape(text), name
    assert "__version__" in text


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        found = Links(page.read_text(encoding="utf-8"))
        away = [link for link in found.loads if re.match(r"(https?:)?//", link)]
        assert not away, f"{page.name}: {away}"


def test_links_and_pictures_are_on_the_site(site: Path) -> None:
    pages = {page.name: Links(page.read_text(encoding="utf-8")) for page in site.glob("*.html")}
    for name, found in pages.items():
        if name == "404.html":
            continue
        for link in [*found.leads, *found.loads]:
            target, _, anchor = unquote(link).partition("#")
            if re.match(r"[a-z]+:", link):
                continue
            place = target or name
            assert (site / place.split("?")[0]).exists(), f"{name}: {link}"
            if anchor and place in pages and not anchor.startswith("__"):
                assert anchor in pages[place].ids, f"{name}: {link}"
