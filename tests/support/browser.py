"""Pages in a real browser without a window, served from this machine."""

from __future__ import annotations

import http.server
import os
import re
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hangs import HANGS

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Measures pages in frames as wide as a phone, a tablet and a desk; the title carries the numbers
# out: how far the page scrolls sideways, how many pictures are drawn, how many elements could load
# or run something, and how light the page is (0 to 255).
WIDTHS = (360, 768, 1280)
FRAME = '<iframe src="%s" style="width: %ipx; height: 800px; border: 0"></iframe>'
FRAMES = """<!DOCTYPE html><title>waiting</title>%s
<script>onload = () => {
  document.title = [...document.querySelectorAll("iframe")].map(({contentDocument: page}) => [
    page.documentElement.scrollWidth - page.documentElement.clientWidth,
    [...page.querySelectorAll("svg")].filter(svg => svg.clientHeight > 100).length,
    page.querySelectorAll("script, img").length,
    getComputedStyle(page.body).backgroundColor.match(/\\d+/)[0]].join()).join(" ");
}</script>"""
_BLINK = {"light": "preferredColorScheme=1", "dark": "preferredColorScheme=0"}


def find() -> str:
    """The browser; without one the test is skipped, but where `CI` is set it fails."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is not None:
        return found
    reason = f"no browser is installed (looked for {', '.join(NAMES)})"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


class Page(HTMLParser):
    """Reads a page strictly: every element that is opened is closed, in order."""

    EMPTY = ("meta", "br", "img", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@contextmanager
def served(pages: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """A server on this machine; gives its address and the list of what was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if self.path in pages else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(pages.get(self.path, "").encode())

        def log_message(self, *_: object) -> None:
            pass

    with _running(Handler) as address:
        yield address, asked


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """A server of the files in a folder; gives its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with _running(partial(Handler, directory=str(folder))) as address:
        yield address


@contextmanager
def _running(handler: Callable[..., http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def check(texts: Sequence[str], folder: Path) -> None:
    """In three widths, in light and dark: no sideways scrolling, no errors, no requests."""
    program = find()
    pages = {f"/{number}.html": text for number, text in enumerate(texts)}
    pages["/"] = FRAMES % "".join(FRAME % (name, wide) for name in pages for wide in WIDTHS)
    pictures = [Page(text).tags["svg"] for text in texts for _ in WIDTHS]
    for scheme in ("light", "dark"):
        with served(pages) as (address, asked):
            said = browse(program, address, folder / scheme, scheme)
        title = re.search(r"<title>(.*?)</title>", said.stdout)
        assert title is not None, said.stderr
        found = [list(map(int, numbers.split(","))) for numbers in title[1].split()]
        assert [numbers[:3] for numbers in found] == [[0, count, 0] for count in pictures]
        assert all((numbers[3] > 127) == (scheme == "light") for numbers in found)
        assert "CONSOLE" not in said.stderr
        assert set(asked) <= {*pages, "/favicon.ico"}


def browse(
    program: str, address: str, folder: Path, scheme: str
) -> subprocess.CompletedProcess[str]:
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-background-networking", "dump-dom"]
    flags += [f"user-data-dir={folder}", "enable-logging=stderr", "virtual-time-budget=5000"]
    flags += ["no-first-run", "disable-extensions", "disable-dev-shm-usage", "disable-sync"]
    flags += ["disable-component-update", "disable-quic", f"blink-settings={_BLINK[scheme]}"]
    command = [program, *(f"--{flag}" for flag in flags), address]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANGS)
