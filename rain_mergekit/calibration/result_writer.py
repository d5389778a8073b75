"""Results are written by a thread while the next layer computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from types import TracebackType


class ResultWriter:
    """The thread; a context manager, which waits until everything has been written.

    Never more than one result waits in memory, beside the one that is being made.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "result-writer")
        self._last: Future[None] | None = None

    def __enter__(self) -> ResultWriter:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown(wait=True)

    def submit(self, write: Callable[[], None]) -> None:
        """Write as soon as the result before has been written; raises what went wrong with that."""
        self.wait()
        context = copy_context()  # so that the phases of the thread are seen by the profile
        self._last = self._pool.submit(context.run, write)

    def wait(self) -> None:
        """Until everything has been written; raises what went wrong."""
        if self._last is not None:
            last, self._last = self._last, None
            last.result()
