"""The picture at the head of README shows what the pages say."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_picture_is_drawn_from_the_pages() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "readme_picture.py"))
    assert drawn["PICTURE"].read_text(encoding="utf-8") == drawn["draw"](), (
        "run: python docs/readme_picture.py"
    )
    assert {"reasoning", "instruct", "ceiling"} - set(drawn["table"]()) == {"ceiling"}
