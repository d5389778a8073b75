"""Files of others are not overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from rain_mergekit.errors import RainError
from rain_mergekit.system.atomic_file import refuse_foreign


def test_a_file_of_others_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    refuse_foreign(path, "a report", "name another", ours=False)  # nothing is there
    path.touch()
    refuse_foreign(path, "a report", "name another", ours=False)  # it is empty
    path.write_text("mine")
    refuse_foreign(path, "a report", "name another", ours=True)
    with pytest.raises(RainError, match=r"report\.html exists and is not a report: .*name another"):
        refuse_foreign(path, "a report", "name another", ours=False)
