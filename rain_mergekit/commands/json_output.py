"""Results for programs: one JSON object on stdout, marked with what it is and its version."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from rain_mergekit.commands.starting import end_notice

F = TypeVar("F", bound=Callable[..., Any])
VERSION = 1  # of all formats; fields may be added under it, none is removed or changes its meaning


def json_option(function: F) -> F:
    """Add the option `--json`."""
    text = "Print the results as JSON, for programs, and nothing else."
    return click.option("--json", "as_json", is_flag=True, help=text)(function)


def print_json(command: str, content: Mapping[str, Any]) -> None:
    """Print one JSON object; null stands for NaN and infinity, which JSON does not have."""
    head = {"format": f"mergekit-rain {command}", "version": VERSION}
    end_notice()
    click.echo(json.dumps({**head, **plain(content)}, indent=1, allow_nan=False))


def plain(value: Any) -> Any:
    """The value as dictionaries, lists, texts and finite numbers; None for other numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
