"""No circles among files or packages, and no long files; the numbers are in tests/support."""

from __future__ import annotations

from structure import arrows, circles, imports, module_lines


def test_nothing_imports_itself_through_others() -> None:
    files = imports()
    assert len(files) > 1000
    assert circles(files) == set()
    assert circles(arrows(files)) == set()
    assert circles({("a", "b"), ("b", "c"), ("c", "b"), ("d", "a")}) == {"b", "c"}


def test_no_file_is_longer_than_300_lines() -> None:
    assert {name: lines for name, lines in module_lines().items() if lines > 300} == {}
