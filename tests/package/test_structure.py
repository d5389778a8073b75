"""No circles, no long files, no constructor that does work; tests/support has the numbers."""

from __future__ import annotations

import ast

from structure import arrows, circles, constructor_work, imports, module_lines, work_in


def test_nothing_imports_itself_through_others() -> None:
    files = imports()
    assert len(files) > 1000
    assert circles(files) == set()
    assert circles(arrows(files)) == set()
    assert circles({("a", "b"), ("b", "c"), ("c", "b"), ("d", "a")}) == {"b", "c"}


def test_no_file_is_longer_than_300_lines() -> None:
    assert {name: lines for name, lines in module_lines().items() if lines > 300} == {}


def test_constructors_only_keep_what_they_are_given() -> None:
    assert constructor_work() == []


def test_work_in_a_constructor_is_seen() -> None:
    source = """
class Reader:
    def __init__(self, path, names):
        self.names = list(names)
        self.counts = Counter[str]()
        self.file = open(path)
        for name in names:
            self.read(name)
"""
    (reader,) = ast.parse(source).body
    assert isinstance(reader, ast.ClassDef)
    assert sorted(work_in(reader, {"list", "Counter"})) == ["for", "open", "self.read"]
