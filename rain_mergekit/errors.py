"""The one exception that stands for a user's mistake or an unusable input."""

from __future__ import annotations


class RainError(Exception):
    """An input cannot be used; the message names it, says what was expected and what to do.

    The command line turns it into one line and a non-zero exit code; it never carries a traceback
    to a user.
    """
