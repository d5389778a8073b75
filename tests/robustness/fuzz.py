"""The fuzz tests' inputs in large numbers: `python tests/robustness/fuzz.py 100000 [part of name]`.

The same as the tests do, without what makes each of them known to pytest and Hypothesis; and while
they run, any file that is opened outside of the tests' own folder, any process, connection or
unpickled name ends it: reading a file does nothing else, whatever is in it.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

# Where the tests lie that hold the inputs, and their helpers.
TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / folder) for folder in ("support", "calibration_file")]

import test_artifact  # noqa: E402
import test_fuzz_readers as readers  # noqa: E402

from rain_mergekit.calibration_file.writer import write_calibration  # noqa: E402


def tests(folder: Path) -> Iterator[tuple[str, Callable[..., None]]]:
    """Each with its arguments, but for the chance."""
    calibration = folder / "c.rain.safetensors"
    write_calibration(calibration, test_artifact.HEADER, test_artifact.stored())
    for test in (test_artifact.test_fuzzed_bytes, test_artifact.test_fuzzed_headers):
        yield test.__name__, partial(inner(test), path=calibration)
    for test in (readers.test_bytes_of_sets, readers.test_fields_of_sets):
        for kind in readers.SETS:
            run = partial(inner(test), tmp_path=folder, kind=kind)
            yield f"{test.__name__}[{kind}]", run
    for test in (
        readers.test_bytes_of_configurations,
        readers.test_fields_of_configurations,
        readers.test_published_coefficients,
    ):
        yield test.__name__, partial(inner(test), tmp_path=folder)


def inner(test: object) -> Callable[..., None]:
    function: Callable[..., None] = test.hypothesis.inner_test  # type: ignore[attr-defined]
    return function


class Alone:
    """An audit hook that lets nothing happen but in one folder, once it is armed."""

    # Opened by name: what Python imports late or shows in a traceback is not of the input's making.
    OWN = tuple(os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, os.getcwd()))
    FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "os.link")
    FORBIDDEN += (
        "socket.",
        "pickle.find_class",
        "marshal.loads",
        "ctypes.",
        "shutil.",
        "os.remove",
    )
    FORBIDDEN += ("os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.chmod", "os.truncate")

    def __init__(self, folder: Path) -> None:
        self.folder, self.armed = os.path.realpath(folder), False

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.armed:
            return
        if event == "open":
            path, mode, _ = arguments
            name = os.path.realpath(os.fsdecode(path)) if isinstance(path, (str, bytes)) else ""
            reads = mode in ("r", "rb") and name.endswith((".py", ".pyc")) and self.own(name)
            wrong = bool(name) and not name.startswith(self.folder + os.sep) and not reads
        else:
            wrong = event.startswith(self.FORBIDDEN)
        if wrong:
            self.armed = False
            sys.stderr.write(f"{event} {arguments!r:.300}\n")
            os._exit(1)

    def own(self, name: str) -> bool:
        return name.startswith(self.OWN)


def one(run: Callable[..., None], seed: str) -> None:
    try:
        run(chance=Random(seed))  # noqa: S311 - no secret
    except BaseException:
        sys.stderr.write(f"Random({seed!r})\n")
        raise


def main(inputs: int, part: str = "") -> None:
    with tempfile.TemporaryDirectory() as folder:
        alone = Alone(Path(folder))
        sys.addaudithook(alone)
        for name, run in tests(Path(folder)):
            if part not in name:
                continue
            start = time.process_time()
            try:
                for number in range(inputs):
                    one(run, f"{name} {number}")
                    alone.armed = number > 20  # what is imported at first is here
            finally:
                alone.armed = False
            sys.stdout.write(f"{name}: {inputs} inputs, {time.process_time() - start:.0f} s\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
