"""The command in many real processes, without ten seconds of imports for each of them.

A server that has imported everything once forks a child for each run. The child can be told to die
(`kill -9`) at its n-th change of the file system, to live within limits, or to stop when a file
comes up; it reports which files it opened for writing.

Run as a program this is the server: one JSON object a line on stdin, answers on stdout.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from hangs import HANGS

NOT_PERMITTED = 77
NO_MOUNTS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOSPC)  # the last: no namespace left
NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000  # of unshare(2)
READ_ONLY, REMOUNT, BIND, PRIVATE = 1, 32, 4096, 0x44000  # of mount(2), PRIVATE with MS_REC
# What changes a folder; Python tells of each of these just before it happens.
CHANGES = ("os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree")


@dataclass(frozen=True)
class Child:
    """One run. `die_at`: killed just before the n-th change of a file's name.

    `stop_at`: stops (as by SIGSTOP) before the first change whose path contains this text.
    `threads`: torch's. `limits`: by the names of the resource module.
    `small`: folders that are file systems of their own with so many bytes; `read_only`: folders
    that the system lets nobody write. Where it does not permit such mounts the exit code is 77.
    `plain`: permissions hold, even if the tests are root's. `program`: of the console scripts.
    """

    argv: list[str]
    log: str
    program: str = "mergekit-rain"
    die_at: int | None = None
    stop_at: str | None = None
    threads: int = 1
    limits: dict[str, int] = field(default_factory=dict)
    small: dict[str, int] = field(default_factory=dict)
    read_only: list[str] = field(default_factory=list)
    plain: bool = False


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code (negative: the signal), its output, and the files it wrote to."""

    code: int
    output: str
    changes: int
    written: list[str]


class Forks:
    """The server's client; `environment` is for the server and all its children."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.log = folder / "child.log"
        self._running = 0
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "TOKENIZERS_PARALLELISM": "false",
                "OMP_NUM_THREADS": "1",
                **environment,
            },
        )

    def start(self, *argv: object, **options: Any) -> int:
        """Start a run; its process id."""
        if self._running:  # a test failed in the middle of it
            os.kill(self._running, signal.SIGKILL)
            self.wait()
        child = Child([str(part) for part in argv], str(self.log), **options)
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(asdict(child)) + "\n")
        self._server.stdin.flush()
        self._running = int(self._answer()["pid"])
        return self._running

    def wait(self) -> Ended:
        """Wait for the run to end."""
        ended = Ended(**self._answer(), output=self.log.read_text(errors="replace"))
        self._running = 0
        return ended

    def run(self, *argv: object, **options: Any) -> Ended:
        self.start(*argv, **options)
        return self.wait()

    def close(self) -> None:
        self._server.kill()
        self._server.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._server.stdout is not None
        ready, _, _ = select.select([self._server.stdout], [], [], HANGS)
        assert ready, "the run does not end: " + self.log.read_text(errors="replace")
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer


def wait_for_stop(pid: int) -> bool:
    """Wait until the process has stopped itself; False if it ended before."""
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state in "TZX":
            return state == "T"
        time.sleep(0.002)


def serve() -> None:
    """Import all that a run needs, then fork for each line."""
    import transformers.models.llama.modeling_llama  # noqa: PLC0415
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401, PLC0415

    import rain_mergekit.calibration.pipeline  # noqa: PLC0415
    import rain_mergekit.commands.merge  # noqa: F401, PLC0415

    for line in sys.stdin:
        request = Child(**json.loads(line))
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            run_child(request, writer)
        os.close(writer)
        answer({"pid": pid})
        report = read_all(reader).splitlines()
        _, status = os.waitpid(pid, 0)
        written = sorted({text for text in report if text and text != "."})
        answer(
            {
                "code": os.waitstatus_to_exitcode(status),
                "changes": report.count("."),
                "written": written,
            }
        )


def answer(content: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def read_all(reader: int) -> str:
    with os.fdopen(reader, errors="replace") as stream:
        return stream.read()


def run_child(request: Child, report: int) -> None:
    """Never returns."""
    log = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, limit in request.limits.items():
        kind = getattr(resource, name)
        resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))
    if request.small or request.read_only:
        try:
            private_mounts(request)
        except OSError as error:
            os._exit(NOT_PERMITTED if error.errno in NO_MOUNTS else 1)
    if request.plain and os.geteuid() == 0:
        without_privileges()
    import torch  # noqa: PLC0415

    torch.set_num_threads(request.threads)
    (script,) = entry_points(group="console_scripts", name=request.program)
    main = script.load()
    sys.addaudithook(Watch(request, report))
    sys.argv = [request.program, *request.argv]
    code = 1
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - as the interpreter would do
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def without_privileges() -> None:
    """Still root by name, but what root may do to everybody's files is no longer allowed."""
    version_3, this_thread, no_sets = 0x20080522, 0, (ctypes.c_uint32 * 6)()
    header = (ctypes.c_uint32 * 2)(version_3, this_thread)
    if ctypes.CDLL(None, use_errno=True).capset(header, no_sets):
        raise OSError(ctypes.get_errno(), "capset")


def private_mounts(request: Child) -> None:
    """Mounts that only this process sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(NEW_MOUNTS | (NEW_USER if user else 0)):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")

    def mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
        parts = [part.encode() for part in (source, target, kind)]
        if libc.mount(*parts, ctypes.c_ulong(flags), options.encode()):
            raise OSError(ctypes.get_errno(), "mount")

    mount("none", "/", "", PRIVATE, "")
    for path, size in request.small.items():
        mount("none", path, "tmpfs", 0, f"size={size}")
    for path in request.read_only:
        mount(path, path, "", BIND, "")
        mount("none", path, "", BIND | REMOUNT | READ_ONLY, "")


class Watch:
    """An audit hook: counts changes, reports files opened for writing, dies where it shall."""

    def __init__(self, request: Child, report: int) -> None:
        self.request, self.report, self.changes = request, report, 0
        self.stop_at = request.stop_at

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes or set(str(mode or "")) & set("wax+"):
                self.tell(os.fsdecode(path) if isinstance(path, (str, bytes)) else str(path))
        elif event in CHANGES:
            self.changes += 1
            self.tell(".")
            for path in arguments[:2]:
                if isinstance(path, (str, bytes)):
                    self.tell(os.fsdecode(path))
            if self.changes == self.request.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.stop_at and self.stop_at in str(arguments[:2]):
                self.stop_at = None
                os.kill(os.getpid(), signal.SIGSTOP)

    def tell(self, text: str) -> None:
        os.write(self.report, (text.replace("\n", " ") + "\n").encode(errors="replace"))


if __name__ == "__main__":
    serve()
