"""Errors in the kind that mergekit's commands print as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from rain_mergekit.errors import RainError


class RainMergeError(RainError, click.ClickException):
    """What stops a merge; mergekit's commands print it as one `Error:` and exit with 1."""


@contextmanager
def reported() -> Iterator[None]:
    """Turn RainError into the kind that mergekit's commands print."""
    try:
        yield
    except RainMergeError:
        raise
    except RainError as error:
        raise RainMergeError(str(error)) from error
