"""How the package is divided: imports between files and packages, circles, lengths.

`python tests/support/structure.py` writes the numbers. An arrow is a pair of a package and another
one that it imports from, whatever the number of imports; `lint-imports` holds their direction.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median, quantiles

import grimp

PACKAGE = "rain_mergekit"
ROOT = Path(__file__).resolve().parents[2] / PACKAGE
Arrow = tuple[str, str]


def imports() -> set[Arrow]:
    """Each file with each other one that it imports, other than the package itself."""
    graph = grimp.build_graph(PACKAGE)
    found = ((one, graph.find_modules_directly_imported_by(one)) for one in graph.modules)
    return {(one, other) for one, others in found for other in others if other != PACKAGE}


def arrows(files: Iterable[Arrow]) -> set[Arrow]:
    """Those between packages; a file outside of them is one of its own."""
    pairs = {(_room(one), _room(other)) for one, other in files}
    return {(one, other) for one, other in pairs if one != other}


def _room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def circles(pairs: Iterable[Arrow]) -> set[str]:
    """Whatever imports itself through others."""
    ahead: dict[str, set[str]] = {}
    for one, other in pairs:
        ahead.setdefault(one, set()).add(other)
    return {start for start in ahead if start in _reached(start, ahead)}


def _reached(start: str, ahead: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    left = [start]
    while left:
        new = ahead.get(left.pop(), set()) - found
        found |= new
        left += new
    return found


def module_lines() -> dict[str, int]:
    """The length of each file."""
    files = sorted(ROOT.rglob("*.py"))
    return {
        str(f.relative_to(ROOT)): len(f.read_text(encoding="utf-8").splitlines()) for f in files
    }


def function_lines() -> Iterator[int]:
    """The length of each function, with its docstring."""
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                yield node.end_lineno - node.lineno + 1


def main() -> None:
    """Write all of it, a line each."""
    files, lengths, functions = imports(), module_lines(), list(function_lines())
    between = arrows(files)
    longest = max(lengths, key=lambda name: lengths[name])
    nine_in_ten = quantiles(functions, n=10)[-1]
    lines = (
        f"{len(lengths)} files, {len(files)} imports, {len(between)} arrows between packages",
        f"in circles: {sorted(circles(files) | circles(between)) or 'nothing'}",
        f"longest file: {longest}, {lengths[longest]} lines",
        f"{len(functions)} functions: median {median(functions):g}, 90 % {nine_in_ten:g} lines",
    )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
