"""The demo's merges, by stock mergekit in a process of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from rain_mergekit.commands.console import Console
from rain_mergekit.commands.moving_bar import moving_bar
from rain_mergekit.demo.files import MERGES
from rain_mergekit.errors import RainError
from rain_mergekit.system.staged_folder import staged_folder

# What `mergekit-yaml CONFIG OUT --quiet` runs, one after the other: the imports take longer than
# these merges, and are needed once.
_PROGRAM = """
import sys
from mergekit.scripts.run_yaml import main
for config, out in zip(sys.argv[1::2], sys.argv[2::2]):
    main.main([config, out, "--quiet"], standalone_mode=False)
    print("merged", flush=True)
"""


def merge_all(folder: Path, console: Console, threads: int) -> None:
    """Every configuration of the demo, each into the folder of its name.

    Raises RainError if one fails; none of the folders is there then.
    """
    with ExitStack() as stack, tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        arguments = []
        for name in MERGES:
            config, out = folder / f"{name}.yml", folder / name
            console.print(f"  mergekit-yaml {shlex.quote(str(config))} {shlex.quote(str(out))}")
            arguments += [str(config), str(stack.enter_context(staged_folder(out)))]
        process = stack.enter_context(
            subprocess.Popen(  # noqa: S603 - this interpreter, this package's own files
                [sys.executable, "-c", _PROGRAM, *arguments],
                env=_environment(threads),
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
        )
        done = 0
        with moving_bar(len(MERGES), "merges", console) as bar:
            for line in process.stdout or ():
                if line == "merged\n":
                    done += 1
                    bar.update(1)
        if process.wait():
            said.seek(0)
            last = (said.read().strip().splitlines() or ["no message"])[-1]
            raise RainError(f"mergekit-yaml {arguments[2 * done]} failed: {last}")


def _environment(threads: int) -> dict[str, str]:
    """Environment in which mergekit finds rain and other libraries print errors only."""
    kept = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    own = {"RAIN_MERGEKIT_AUTOLOAD": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {**kept, **own, "OMP_NUM_THREADS": str(threads)}
