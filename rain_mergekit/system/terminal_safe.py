"""Escape control characters in untrusted text before printing it."""

from __future__ import annotations


def clean(text: str) -> str:
    """The text with every control character written out, so that it cannot affect a terminal."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def clean_lines(text: str) -> str:
    """`clean` for each line of a text: messages contain names from files and models."""
    return "\n".join(map(clean, text.split("\n")))
