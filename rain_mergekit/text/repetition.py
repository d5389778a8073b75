"""How much a text repeats itself: loops, spans that come twice, n-grams, compression."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Words; single signs of scripts that put no space between words; runs of punctuation. Endless runs
# without a space are cut, so that they are many units.
_UNIT = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\w{1,24}|[^\w\s]{1,8}")
NGRAM = 4
# A span that comes this often in a row, over this many units in all, is a loop: tables, lists and
# lines of code stay below.
TIMES, LENGTH = 4, 48
_LONGEST_PERIOD = 1000


@dataclass(frozen=True)
class Loop:
    """The same `period` units again and again, for `length` units in all, from unit `start` on."""

    start: int
    period: int
    length: int

    @property
    def times(self) -> float:
        """How often the span comes."""
        return self.length / self.period


@dataclass(frozen=True)
class Repetition:
    """How much one text repeats itself.

    units: words and signs. longest: units of the longest span that comes twice without overlap.
    ngrams: share of its 4-grams that have come before. compression: bytes of the text for each
    byte that zlib needs (prose about 2 to 3, loops 10 and more). loop: None where there is none.
    """

    units: int
    longest: int
    ngrams: float
    compression: float
    loop: Loop | None


def repetition(text: str) -> Repetition:
    """Measure one text; of an empty one everything is 0, and the compression 1."""
    words = units(text)
    numbered = _numbered(words)
    data = text.encode("utf-8", "replace")
    return Repetition(
        units=len(words),
        longest=longest_repeat(numbered),
        ngrams=repeated_ngrams(words),
        compression=len(data) / len(zlib.compress(data)) if data else 1.0,
        loop=find_loop(numbered),
    )


def units(text: str) -> list[str]:
    """Words and signs in their order."""
    return _UNIT.findall(text)


def repeated_ngrams(words: Sequence[str], n: int = NGRAM) -> float:
    """1 - distinct / all n-grams; 0 where there are none."""
    count = len(words) - n + 1
    if count < 1:
        return 0.0
    return 1.0 - len({tuple(words[i : i + n]) for i in range(count)}) / count


def longest_repeat(numbered: Tensor) -> int:
    """Length of the longest span that comes at least twice without overlapping itself.

    numbered: one integer a unit (N). Spans of 2^k units are named by pairs of those of 2^(k-1); a
    length is tried by pairs of them, and halving finds the longest: O(N log² N).
    """
    names = [numbered]
    while (width := 1 << len(names)) <= len(numbered) // 2:
        names.append(_paired(names[-1], width // 2, len(numbered) - width + 1))
    low, high = 0, len(numbered) // 2
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _comes_twice(names, middle) else (low, middle - 1)
    return low


def find_loop(numbered: Tensor) -> Loop | None:
    """The longest stretch in which a span comes at least 4 times in a row, 48 units or more.

    numbered: one integer a unit (N). Its period is the shortest that fits.
    """
    best: Loop | None = None
    for period in range(1, min(len(numbered) // TIMES, _LONGEST_PERIOD) + 1):
        same, wanted = numbered[period:] == numbered[:-period], max(LENGTH, TIMES * period)
        if int(same.count_nonzero()) + period < wanted:  # no run is longer: most periods end here
            continue
        start, run = _longest_run(same)
        length = run + period
        if length >= wanted and (best is None or length > best.length + period):
            best = Loop(start, period, length)
    return best


def _numbered(words: Sequence[str]) -> Tensor:
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(word, len(numbers)) for word in words]).long()


def _paired(names: Tensor, apart: int, count: int) -> Tensor:
    """Equal numbers where both spans are equal: that at i and that at i + apart, for i < count."""
    pairs = names[:count] * (int(names.max()) + 1) + names[apart : apart + count]
    found: Tensor = torch.unique(pairs, return_inverse=True)[1]
    return found


def _comes_twice(names: Sequence[Tensor], length: int) -> bool:
    power = length.bit_length() - 1
    count = len(names[0]) - length + 1
    spans = _paired(names[power], length - (1 << power), count)
    places = torch.arange(count)
    none = torch.full((int(spans.max()) + 1,), count)
    first = none.scatter_reduce(0, spans, places, "amin")
    last = torch.zeros_like(none).scatter_reduce(0, spans, places, "amax")
    return bool((last - first >= length).any())


def _longest_run(same: Tensor) -> tuple[int, int]:
    """Start and length of the longest run of true; (0, 0) if there is none."""
    edges = torch.nn.functional.pad(same.int(), (1, 1)).diff()
    starts, ends = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    if not len(starts):
        return 0, 0
    longest = int((ends - starts).argmax())
    return int(starts[longest]), int(ends[longest] - starts[longest])
