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


# What a constructor may call: it keeps what it is given, in containers and empty sums.
_KEEPING = {
    *("bool", "dict", "enumerate", "float", "frozenset", "int", "isinstance", "len", "list"),
    *("range", "set", "sorted", "str", "super", "tuple", "type", "getattr"),
    *("dict.fromkeys", "object.__setattr__", "super().__init__"),
    *("Counter", "OrderedDict", "defaultdict", "deque", "Path", "os.fspath"),
    *("threading.Lock", "weakref.finalize", "torch.device", "torch.empty", "torch.zeros"),
}
# Further calls of single classes, with the reason why each is no work.
_ALLOWED = {
    "Checkpoint.LazyTensorLoader": "keeps the index; opens a shard when a tensor is asked for",
    "ReaderThread.ThreadPoolExecutor": "starts its thread when it is given something to read",
    "ResultWriter.ThreadPoolExecutor": "starts its thread when it is given something to write",
    "Profile.time.perf_counter": "a stopwatch, which starts when it is made",
    "Profile.threading.get_ident": "its thread is the one that it is made in",
    "JsonFields.kind": "the words of a refusal",
    "HeaderFields.self.fail": "the refusal",
}


def constructor_work() -> list[str]:
    """Whatever a constructor does besides keeping what it is given, as `file: Class: call`.

    Constructing a class of the package is keeping too: its own constructor is looked at here.
    """
    trees = {f.relative_to(ROOT): ast.parse(f.read_text("utf-8")) for f in ROOT.rglob("*.py")}
    classes = [
        (file, node)
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    keeping = _KEEPING | {node.name for _, node in classes}
    return [
        f"{file}: {node.name}: {call}"
        for file, node in classes
        for call in work_in(node, keeping)
        if f"{node.name}.{call}" not in _ALLOWED
    ]


def work_in(owner: ast.ClassDef, keeping: set[str]) -> Iterator[str]:
    for method in owner.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            for node in ast.walk(method):
                if isinstance(node, ast.For | ast.While | ast.With | ast.Try):
                    yield type(node).__name__.lower()
                elif isinstance(node, ast.Call) and not _keeps(node.func, keeping):
                    yield ast.unparse(node.func)


def _keeps(called: ast.expr, keeping: set[str]) -> bool:
    if isinstance(called, ast.Subscript):  # `Counter[str]()`
        called = called.value
    name = ast.unparse(called)
    return name in keeping or name.endswith(".items")


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
