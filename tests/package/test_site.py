"""The documentation as a site: it builds without a warning, loads nothing from elsewhere, fits."""

from __future__ import annotations

import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from browser import WIDTHS, browse, find, serving
from doc_blocks import PAGES, ROOT
from hangs import HANGS

import rain_mergekit

# Shows each page in a frame as wide as a phone, a tablet and a desk. The title says what does
# not fit: a page that scrolls sideways, a table on a desk that does, a name in a table's first
# column that is broken; and pages without the theme that was asked for.
MEASURE = """<!DOCTYPE html><title>waiting</title>%s
<script>onload = () => {
  const found = [];
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement;
    const say = text => found.push(`${frame.getAttribute("src")} at ${frame.width}: ${text}`);
    for (const width of %s) {
      frame.width = width;
      if (root.scrollWidth > root.clientWidth) say("scrolls sideways");
      for (const table of page.querySelectorAll(".md-typeset table")) {
        const box = table.closest(".md-typeset__scrollwrap") ?? table.parentElement;
        if (width >= 1280 && box.scrollWidth > box.clientWidth)
          say(`a table scrolls: ${box.innerText.slice(0, 40)}`);
        for (const code of table.querySelectorAll("td:first-child code"))
          if (code.getClientRects().length > 1) say(`${code.textContent} is broken`);
      }
    }
    if (page.body.dataset.mdColorScheme !== "%s") say(page.body.dataset.mdColorScheme);
  }
  document.title = `measured: ${found.join("; ")}`;
}</script>"""


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


@pytest.mark.parametrize(("scheme", "named"), [("light", "default"), ("dark", "slate")])
def test_pages_fit_a_phone_a_tablet_and_a_desk(
    site: Path, scheme: str, named: str, tmp_path: Path
) -> None:
    program = find()
    names = sorted(str(page.relative_to(site)) for page in site.rglob("*.html"))
    measure = site / "measure.html"
    wide = sorted(WIDTHS, reverse=True)  # so that nothing slides in while it is measured
    frames = "".join(
        f'<iframe src="{name}" width="{wide[0]}" height="800"></iframe>' for name in names
    )
    measure.write_text(MEASURE % (frames, wide, named), encoding="utf-8")
    try:
        with serving(site) as address:
            said = browse(program, f"{address}/measure.html", tmp_path / scheme, scheme).stdout
    finally:
        measure.unlink()
    title = re.search(r"<title>(.*?)</title>", said)
    assert title is not None
    assert unescape(title[1]) == "measured: "
