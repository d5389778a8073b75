"""Fresh virtual environments for the installation tests: dependencies linked in, not ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import uv

ROOT = Path(__file__).parents[2]
_UV = uv.find_uv_bin()
_OURS = ("rain_mergekit", "_rain_mergekit", "__editable__")


@dataclass(frozen=True)
class Environment:
    """A virtual environment; what is run in it finds this package only if it was installed."""

    path: Path

    @property
    def python(self) -> str:
        return str(self.path / "bin" / "python")

    @property
    def packages(self) -> Path:
        return next((self.path / "lib").glob("python3.*")) / "site-packages"

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command outside the checkout, with no settings of the calling process."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "RAIN_"))}
        environment = {**kept, "OMP_NUM_THREADS": "1", **variables}
        return subprocess.run(
            command, cwd=self.path, env=environment, capture_output=True, text=True, check=False
        )

    def check(self, script: str, **variables: str) -> str:
        """Run a Python script that must succeed and say nothing on stderr; return its stdout."""
        done = self.run(self.python, "-c", script, **variables)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout.strip()

    def install(self, installer: str, *what: str) -> None:
        """Install with the named tool, from what is here: no dependencies, no network."""
        tool = {
            "pip": (sys.executable, "-m", "pip", "--python", self.python, "install", "--no-index"),
            "uv": (_UV, "pip", "install", "--python", self.python, "--offline", "--no-cache"),
        }
        self._succeed(*tool[installer], "--no-deps", "--no-build-isolation", *what)

    def uninstall(self) -> None:
        """Uninstall this package with pip."""
        self._succeed(
            sys.executable, "-m", "pip", "--python", self.python, "uninstall", "-y", "rain-mergekit"
        )

    def add_command(self, name: str) -> str:
        """Copy an installed console script here, to be run by this environment's interpreter."""
        source = Path(sys.executable).parent / name
        script = self.path / "bin" / name
        _, _, body = source.read_text(encoding="utf-8").partition("\n")
        script.write_text(f"#!{self.python}\n{body}", encoding="utf-8")
        script.chmod(0o755)
        return str(script)

    def _succeed(self, *command: str) -> None:
        done = self.run(*command)
        assert done.returncode == 0, done.stdout + done.stderr


def link_dependencies(folder: Path) -> Path:
    """Fill the folder with links to everything that is installed, except this package."""
    folder.mkdir(exist_ok=True)
    for site in (Path(entry) for entry in sys.path if Path(entry).name == "site-packages"):
        for item in site.iterdir():
            link = folder / item.name
            if not item.name.startswith(_OURS) and not link.is_symlink():
                link.symlink_to(item)
    return folder


def create(path: Path, dependencies: Path) -> Environment:
    """Create a virtual environment in which the linked dependencies can be imported."""
    venv.create(path, with_pip=False, symlinks=True)
    environment = Environment(path)
    (environment.packages / "dependencies.pth").write_text(f"{dependencies}\n", encoding="utf-8")
    return environment


def build_wheel(folder: Path) -> Path:
    """Build this package's wheel from a copy of the sources, without build isolation."""
    sources = folder / "sources"
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        sources.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, sources)
    for name in ("rain_mergekit", "configs", "calibration"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = ("-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w")
    subprocess.run(
        (sys.executable, *command, str(folder), str(sources)), check=True, capture_output=True
    )
    return next(folder.glob("*.whl"))
