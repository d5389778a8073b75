"""Files that are broken by chance, the same one for the same seed.

Drawing from a seed costs a tenth of what drawing each part from a strategy does, so that a test
gets through a hundred thousand of them in minutes.
"""

from __future__ import annotations

import json
import os
from random import Random
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FUZZ = settings(
    max_examples=int(os.environ.get("RAIN_FUZZ_EXAMPLES", "100")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
chances = st.integers(0, 2**60).map(Random)
# What formats give a meaning to: JSON, YAML, the numbers of a binary header.
PIECES = (b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\ud800", b"\xff", b"\x00", b"\n", b"null")
PIECES += (b"1e999", b"-1", b"9" * 25, b"\xff" * 8, b"\x00" * 8, b"&a [*a]", b"<<: *a", b"*a")
PIECES += (b"!!python/object/apply:os.system [id]", b"- ", b"? ", b"\xe2", b"../", b"[" * 1200)
VALUES = (None, True, False, 0, -1, 1, 2**31, 10**25, 0.5, -0.0, 1e308, float("nan"), "", "\ud800")
VALUES += ("../../etc/passwd", "/dev/zero", "x" * 5000, "rain", "instruct", "off", "\u2028", [], {})


def edited(data: bytes, chance: Random) -> bytes:
    """One to six times, bytes are put in, replaced, taken away or doubled, or the rest is cut."""
    for _ in range(chance.randint(1, 6)):
        at = chance.randint(0, len(data))
        kind = chance.randrange(20)
        text = chance.choice(PIECES) if kind % 2 else chance.randbytes(chance.randint(0, 9))
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + data[at : at + chance.randint(1, 200)] * 2 + data[at:]
        else:
            data = data[:at] + text + data[at + chance.choice((0, 0, len(text), 1, 30)) :]
    return data


def edited_text(text: str, chance: Random) -> bytes:
    """Half of them are UTF-8 again: most others end at the first byte that is not."""
    data = edited(text.encode(), chance)
    return data if chance.randrange(2) else data.decode(errors="ignore").encode()


def value(chance: Random, *more: Any) -> Any:
    """Any JSON value, or one of `more`."""
    kind = chance.randrange(8)
    if kind == 0:
        return [value(chance, *more) for _ in range(chance.randint(0, 3))]
    if kind == 1:
        return {_name(chance): value(chance, *more) for _ in range(chance.randint(0, 3))}
    if kind == 2:
        return chance.randint(-(2**70), 2**70)
    if kind == 3:
        return chance.uniform(-10, 10) * 10 ** chance.randint(-30, 30)
    if kind == 4:
        return _name(chance)
    return chance.choice((*VALUES, *more))


def _name(chance: Random) -> str:
    return "".join(chr(chance.randrange(32, 1 << chance.randint(6, 15))) for _ in range(4))


def changed(content: Any, chance: Random, *more: Any) -> Any:
    """One to three of its values or names, wherever they are, become something else."""
    content = json.loads(json.dumps(content))
    for _ in range(chance.randint(1, 3)):
        places = list(_places(content))
        if not places:
            break
        target, key = chance.choice(places)
        if isinstance(target, dict) and not chance.randrange(3):
            target[_name(chance)] = target.pop(key)
        elif not chance.randrange(4):
            del target[key]
        else:
            target[key] = value(chance, *more)
    return content


def _places(content: Any) -> Any:
    """Every (object or list, key or index) in it, at any depth."""
    if not isinstance(content, (dict, list)):
        return
    for key, item in list(content.items() if isinstance(content, dict) else enumerate(content)):
        yield content, key
        yield from _places(item)
