"""Escape control characters in untrusted text before printing it."""

from __future__ import annotations


def clean(text: str) -> str:
    """The text with every character that could steer a terminal made visible."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def clean_lines(text: str) -> str:
    """The same line by line: names from files and models stand in what is said."""
    return "\n".join(map(clean, text.split("\n")))
