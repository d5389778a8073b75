"""Writing a page to disk, never over a file that is none."""

from __future__ import annotations

from rain_mergekit.report.extra import require_matplotlib
from rain_mergekit.system.atomic_file import destination, refuse_foreign, replacing


def protect_foreign(output: str) -> None:
    """RainError if the path holds no page: arguments in the wrong order must not cost a file."""
    path, ours = destination(output), True
    if path.is_file():
        with path.open("rb") as file:
            ours = file.read(9).upper().startswith(b"<!DOCTYPE")
    refuse_foreign(output, "an HTML page", "name another file", ours=ours)


def check_page(output: str) -> None:
    """RainError if no page can be drawn, or not there; asked before anything that takes time."""
    require_matplotlib()
    protect_foreign(output)


def write_page(output: str, page: str) -> None:
    """The page as UTF-8, as a whole or not at all; RainError if it cannot be written."""
    protect_foreign(output)
    with replacing(output) as out:
        out.write(page.encode("utf-8", "replace"))
