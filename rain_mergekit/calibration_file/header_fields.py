"""An object of a calibration file's header: typed getters that name the field that is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from rain_mergekit.calibration_file.container import Entry
from rain_mergekit.errors import RainError


class HeaderFields:
    """An object of the header; each getter checks the type and names the field when it is wrong."""

    def __init__(self, values: Any, where: str, entries: Mapping[str, Entry]) -> None:
        self.where = where
        self.entries = entries
        if not isinstance(values, dict):
            self.fail("", "an object", values)
        self._values = values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def get(self, name: str) -> Any:
        """The value as it is; None where there is none."""
        return self._values.get(name)

    def fail(self, name: str, expected: str, found: object) -> NoReturn:
        """Raise RainError with the whole path of the field."""
        path = f"{self.where}.{name}".strip(".") or "the header"
        raise RainError(f"field {path!r} must be {expected}, found {found!r:.60}")

    def table(self, name: str) -> HeaderFields:
        """An object."""
        return HeaderFields(self.get(name), f"{self.where}.{name}".strip("."), self.entries)

    def tables(self) -> list[tuple[str, HeaderFields]]:
        """All objects by name."""
        return [(name, self.table(name)) for name in self._values]

    def text(self, name: str) -> str:
        """A text."""
        value = self.get(name)
        if not isinstance(value, str):
            self.fail(name, "a text", value)
        return value

    def optional_text(self, name: str) -> str | None:
        """A text, or None."""
        return None if self.get(name) is None else self.text(name)

    def natural(self, name: str, least: int, most: int | None = None) -> int:
        """A whole number of at least `least` and at most `most`."""
        value = self.get(name)
        if type(value) is not int or value < least or (most is not None and value > most):
            limit = f" and at most {most}" if most is not None else ""
            self.fail(name, f"a whole number of at least {least}{limit}", value)
        return value

    def naturals(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers of at least 0."""
        value = self.get(name)
        if not isinstance(value, list) or not all(type(one) is int and one >= 0 for one in value):
            self.fail(name, "a list of whole numbers of at least 0", value)
        return tuple(value)

    def optional_flag(self, name: str) -> bool:
        """True or false; false where there is none."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            self.fail(name, "true or false", value)
        return value is True

    def optional_number(self, name: str) -> float | None:
        """A finite number, or None."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
            self.fail(name, "a finite number", value)
        return float(value)

    def key(self, name: str, shape: tuple[int | None, ...]) -> str | None:
        """A key of a stored floating-point tensor of this shape (None: any size), or null."""
        key = self.optional_text(name)
        if key is None:
            return None
        entry = self.entries.get(key)
        if entry is None:
            self.fail(name, "the key of a stored tensor", key)
        elif not entry.dtype.is_floating_point or not _fits(entry.shape, shape):
            self.fail(name, f"a floating-point tensor of shape {list(shape)}", list(entry.shape))
        return key


def _fits(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    pairs = zip(found, wanted, strict=False)
    return len(found) == len(wanted) and all(want in (None, have) for have, want in pairs)
