"""The one exception that stands for a user's mistake or an unusable input."""

from __future__ import annotations


class RainError(Exception):
    """An input cannot be used; the message names it, says what was expected and what to do.

    The command line shows it as one line, without a traceback, and exits with code 1.
    """
