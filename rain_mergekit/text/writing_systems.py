"""Which scripts a text is written in, to see that an answer leaves the language of its prompt."""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache
from itertools import groupby

# Written together: Japanese mixes all of them.
_EAST_ASIAN = {"CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO"}
# As much of a foreign script is a quotation, a name or a formula.
LEAST_SHARE, LEAST_LETTERS = 0.02, 3
_LATIN, _LATIN_SHARE = "LATIN", 0.5


def scripts(text: str) -> Counter[str]:
    """Letters by script, such as LATIN, CYRILLIC, CJK (with kana), ARABIC.

    Letters that stand alone are left out (as in formulas), but not those of East Asian scripts.
    """
    found: Counter[str] = Counter()
    for script, letters in groupby(text, _script):
        count = sum(1 for _ in letters)
        if script and (count > 1 or script == "CJK"):
            found[script] += count
    return found


def foreign_share(prompt: str, text: str) -> float:
    """Share of the text's letters in scripts that the prompt has none of, Latin not counted.

    Latin letters are names and code in any language; they count where they are more than half.
    0 where the text or the prompt has no letters, or fewer than 3 of the text's are foreign.
    """
    own, found = scripts(prompt), scripts(text)
    total = sum(found.values())
    if not own or not total:
        return 0.0
    foreign = {script: count for script, count in found.items() if script not in own}
    latin = foreign.pop(_LATIN, 0)
    count = sum(foreign.values()) + (latin if latin > _LATIN_SHARE * total else 0)
    return count / total if count >= LEAST_LETTERS else 0.0


@lru_cache(maxsize=4096)
def _script(char: str) -> str:
    """The first word of a letter's name in Unicode; "" for what is no letter."""
    if not char.isalpha():
        return ""
    name = unicodedata.name(char, "").partition(" ")[0]
    return "CJK" if name in _EAST_ASIAN else name
