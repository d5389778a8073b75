"""What is built: a wheel with the package alone, a source distribution that gives the same wheel.

The wheel is installed into a fresh environment, where a few of these tests run away from the
sources. All of them run against an installed wheel in `.ci/run`, with the sources beside them.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import environments
import pytest
from environments import ROOT

import rain_mergekit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGE = Path(rain_mergekit.__file__).parent
IGNORED = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "shared", "*.egg-info", "dist")
# Files of every version, and merges.
SUITE = ("calibration_file/test_golden.py", "end_to_end/test_lora.py")


def build(sources: Path, folder: Path, *targets: str) -> list[Path]:
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder), *targets]
    subprocess.run(command, cwd=sources, check=True, capture_output=True)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module", name="built")
def _built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the source distribution, from a copy of the sources."""
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, folder / "sources", ignore=IGNORED)
    wheel, sdist = build(folder / "sources", folder / "dist")
    assert (wheel.suffix, sdist.suffix) == (".whl", ".gz")
    return wheel, sdist


def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
    ours = {
        str(path.relative_to(PACKAGE.parent))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    } | {
        f"rain_mergekit/examples/{path.relative_to(PACKAGE.parent)}"
        for folder in ("configs", "calibration")
        for path in (PACKAGE.parent / folder).rglob("*")
        if path.is_file()
    }
    about = f"rain_mergekit-{rain_mergekit.__version__}.dist-info"
    written = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    assert names == ours | {f"{about}/{name}" for name in written}
    shipped = (
        "py.typed",
        "trio/reasoning/model.safetensors",
        "trio/instruction.jsonl",
        "examples/configs/reference.yml",
    )
    assert {f"rain_mergekit/{name}" for name in shipped} <= names


def test_the_source_distribution_gives_the_same_wheel(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    with tarfile.open(built[1]) as sdist:
        names = [name.partition("/")[2] for name in sdist.getnames()]
        sdist.extractall(tmp_path, filter="data")
    expected = {"tests/package/test_packaging.py", "docs/settings.md", ".ci/run", "LICENSE"}
    assert expected <= set(names)
    assert not [name for name in names if re.search(r"(^|/)(\.git/|shared/|__pycache__)", name)]
    (again,) = build(next(tmp_path.iterdir()), tmp_path / "dist", "-t", "wheel")
    assert again.read_bytes() == built[0].read_bytes()


def contents(fresh: environments.Environment) -> set[Path]:
    """All that an installation could leave: packages, their metadata, .pth files, commands."""
    folders = (fresh.packages, fresh.path / "bin")
    return {p for f in folders for p in f.rglob("*") if p.parent.name != "__pycache__"}


@pytest.mark.slow
def test_the_wheel_works_away_from_the_sources(
    built: tuple[Path, Path], dependencies: Path, tmp_path: Path
) -> None:
    """And nothing is left of it when it is uninstalled."""
    fresh = environments.create(tmp_path / "venv", dependencies)
    before = contents(fresh)
    fresh.install("pip", str(built[0]))
    where = fresh.check("import rain_mergekit; print(rain_mergekit.__file__)")
    assert Path(where).is_relative_to(fresh.packages)
    away = tmp_path / "away"
    for name in ("tests", "docs"):
        shutil.copytree(ROOT / name, away / name, ignore=IGNORED)
    for name in ("pyproject.toml", "README.md", "SECURITY.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, away)
    tests = [str(away / "tests" / name) for name in SUITE]
    done = fresh.run(
        fresh.python, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *tests
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\n\d+ passed", done.stdout)
    fresh.uninstall()
    assert contents(fresh) == before


NAMES = {"pyyaml": "yaml", "if-verifiable": "if_verifiable"}  # what is not imported as it is called


def requirements() -> dict[str, str]:
    """Import name and requirement, of what runs need (not of what builds docs or tests need)."""
    extras = PROJECT["optional-dependencies"]
    names = ("report", "ifeval", "parquet", "fast")
    lines = [*PROJECT["dependencies"], *(line for name in names for line in extras[name])]
    found = {}
    for line in lines:
        name = re.split(r"[<>=;\[ ]", line)[0].lower()
        found[NAMES.get(name, name)] = line
    return found


def imported() -> set[str]:
    names: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"rain_mergekit"}


def test_every_dependency_is_used_and_every_import_declared() -> None:
    """peft is mergekit's, imported where it has merged an adapter; markupsafe comes with jinja2."""
    assert imported() - {"peft", "markupsafe"} == set(requirements())


def test_every_dependency_has_a_bound_and_a_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name, line in requirements().items():
        assert re.search(r">=\d", line), name
        assert re.search(rf'^ *"{re.escape(line)}", +# \w', text, re.MULTILINE), name
