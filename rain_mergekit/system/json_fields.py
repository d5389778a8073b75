"""Typed access to the fields of a JSON object, for messages that name place and field."""

from __future__ import annotations

from rain_mergekit.errors import RainError
from rain_mergekit.system.json_samples import JsonObject

_KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    str: "a string",
}


class JsonFields:
    """Typed access to the fields of one JSON object; every error names place and field."""

    def __init__(self, source: str, value: object, path: str = "") -> None:
        self.source, self.path = source, path
        if not isinstance(value, JsonObject):
            what = f"field '{path}'" if path else "a sample"
            raise RainError(f"{source}: {what} must be a JSON object, found {kind(value)}")
        self._value = value

    @property
    def raw(self) -> dict[str, object]:
        """The object as it was read."""
        return self._value

    def value(self, name: str) -> object:
        """The value of any kind, or None if it is absent."""
        return self._get(name)[1]

    def _get(self, name: str) -> tuple[str, object]:
        label = f"{self.path}.{name}" if self.path else name
        if name in self._value.repeated:
            raise RainError(f"{self.source}: field '{label}' is given twice; keep one of them")
        return label, self._value.get(name)

    def text(self, name: str) -> str | None:
        """The string, or None if it is absent, null or blank."""
        label, value = self._get(name)
        return None if value is None else text_of(self.source, label, value) or None

    def required(self, name: str, remedy: str = "every sample needs this text") -> str:
        """The string; if there is none, RainError with the remedy."""
        text = self.text(name)
        if text is None:
            label, _ = self._get(name)
            raise RainError(f"{self.source}: field '{label}' is missing or blank: {remedy}")
        return text

    def items(self, name: str, *, optional: bool = False) -> list[tuple[str, object]]:
        """The list's items, each with the label that names it in messages."""
        label, value = self._get(name)
        if value is None and optional:
            return []
        if not isinstance(value, list):
            found = "nothing" if value is None else kind(value)
            raise RainError(f"{self.source}: field '{label}' must be a list, found {found}")
        return [(f"{label}[{index}]", item) for index, item in enumerate(value)]

    def spans(self, name: str, *, optional: bool = False) -> tuple[str, ...]:
        """The list's strings, none of them blank."""
        spans = []
        for label, item in self.items(name, optional=optional):
            span = text_of(self.source, label, item)
            if not span:
                raise RainError(f"{self.source}: field '{label}' is blank; remove that span")
            spans.append(span)
        return tuple(spans)


def kind(value: object) -> str:
    """What a JSON value is, in words."""
    return "null" if value is None else _KINDS.get(type(value), "an object")


def text_of(source: str, label: str, value: object) -> str:
    """The string as it is, or "" if it is only white space."""
    if not isinstance(value, str):
        raise RainError(f"{source}: field '{label}' must be a string, found {kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as exc:  # "\ud800" is valid JSON, but no tokenizer takes it
        raise RainError(
            f"{source}: field '{label}' has half of a surrogate pair at character {exc.start}; "
            "write the whole character"
        ) from exc
    return value if value.strip() else ""


def require_texts(source: str, label: str, value: object) -> None:
    """Raise RainError for a text that no tokenizer accepts, at any depth of the value."""
    if isinstance(value, str):
        text_of(source, label, value)
    elif isinstance(value, dict):
        for name, item in value.items():
            require_texts(source, f"{label}.{name}", item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            require_texts(source, f"{label}[{index}]", item)
