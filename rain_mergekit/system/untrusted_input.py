"""Read small files of unknown origin within size limits, and YAML without alias bombs."""

from __future__ import annotations

import errno
import math
import os
import re
import stat
from collections import Counter
from pathlib import Path
from reprlib import Repr
from typing import Any

import yaml

from rain_mergekit.errors import RainError


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none.

    Followed by the second line where the first only introduces it.
    """
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {more[0].strip()}" if first.endswith(":") and more else first


MIB = 1024**2
TEXT_LIMIT = 64 * MIB  # configurations, cards and the like are thousands of bytes
NODES = 100_000
_HALF = re.compile("[\ud800-\udfff]")
_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_SIZE = 1024
_REPR = Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


def read_regular(path: str | os.PathLike[str], limit: int = TEXT_LIMIT) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; links are followed.

    Raises OSError for anything else: reading a device or a pipe would never end.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    with open(path, "rb") as file:
        data = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit // MIB} MiB")
    return data


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is a git-lfs pointer: a few lines in the place of the file itself."""
    try:
        if not path.is_file() or path.stat().st_size > _POINTER_SIZE:
            return False
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except (OSError, ValueError):  # without permission; whoever reads the file reports that
        return False


def within(folder: str | os.PathLike[str], name: str) -> Path:
    """The path of a file that lies in the folder, or may be made there.

    Raises RainError for a link that leads outside: a folder from somebody else must not decide
    which other files are read or overwritten.
    """
    path = Path(folder, name)
    if not path.resolve().is_relative_to(Path(folder).resolve()):
        raise RainError(f"{path}: is a link to outside of its folder; put a copy in its place")
    return path


def load_yaml(text: str) -> Any:
    """`yaml.safe_load`, but ValueError for lone surrogates, duplicate keys and alias bombs.

    A few lines of aliases can stand for billions of values, which would fill the memory as soon as
    something visits them all, even an error message. A lone surrogate cannot be printed.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Number of nodes with every alias written out; each node is visited once."""
    known = sizes.get(id(node))
    if known is None:
        if isinstance(node, yaml.ScalarNode) and _HALF.search(node.value):
            raise ValueError("it holds a lone surrogate, such as \\ud800; write it as UTF-8")
        if isinstance(node, yaml.MappingNode):
            _require_once([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        sizes[id(node)] = NODES  # a node met again before its size is known contains itself
        known = 1 + sum(_size(part, sizes) for part in _parts(node))
        if known > NODES:
            raise ValueError("its aliases repeat too much, or contain themselves; write them out")
        sizes[id(node)] = known
    return known


def _require_once(keys: list[str]) -> None:
    """Refuse duplicate keys (PyYAML silently takes the last one); `<<` may occur several times."""
    twice = [key for key, count in Counter(keys).items() if count > 1 and key != "<<"]
    if twice:
        raise ValueError(f"{shown(twice[0])} is given twice in one place; keep one of them")


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def finite_number(value: object) -> float | None:
    """The finite number that a value is, or that its text spells; None for anything else.

    YAML's `on` and `yes` (true) are not numbers here, and neither is NaN.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def shown(value: object) -> str:
    """Like `repr`, but of bounded length."""
    try:
        return _REPR.repr(value)
    except ValueError:  # a number with more digits than Python writes
        return "a number of very many digits"


def shortened(text: str, limit: int = 700) -> str:
    """One line, of a bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit // 2]} … {line[-limit // 4 :]}"
