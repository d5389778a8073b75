"""The fuzz tests' inputs in large numbers: `python tests/fuzz.py 100000 [part of a test's name]`.

The same as the tests do, without what makes each of them known to pytest and Hypothesis.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

import test_artifact
import test_fuzz_readers as readers

from rain_mergekit.artifact import write_calibration


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


def one(run: Callable[..., None], seed: str) -> None:
    try:
        run(chance=Random(seed))  # noqa: S311 - no secret
    except BaseException:
        sys.stderr.write(f"Random({seed!r})\n")
        raise


def main(inputs: int, part: str = "") -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, run in tests(Path(folder)):
            if part not in name:
                continue
            start = time.process_time()
            for number in range(inputs):
                one(run, f"{name} {number}")
            sys.stdout.write(f"{name}: {inputs} inputs, {time.process_time() - start:.0f} s\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
