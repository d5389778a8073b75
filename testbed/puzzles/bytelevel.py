"""A byte-level BPE tokenizer whose merges make every known word one token.

transformers 5 loads any `qwen2` checkpoint with its own `Qwen2Tokenizer`, whatever tokenizer class
and pre-tokenizer were saved; a word-level tokenizer would silently fall apart into letters there.
So this one is what that class expects: bytes, merges, and the standard splitting of text.
"""

from collections.abc import Sequence
from typing import cast

from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

SPACE, BREAK = "\u0120", "\u010a"
Merge = tuple[str, str]


def word_merges(word: str) -> list[Merge]:
    """Build a word from its left end, letter by letter."""
    return [(word[:end], word[end]) for end in range(1, len(word))]


def merges_for(words: Sequence[str], starters: Sequence[str]) -> list[Merge]:
    """Merges for words after a space, then for the few that start a text.

    Merges after a space all begin with it, so they never meet inside another word. Those of
    starters may, so longer beginnings go first: a word once begun is finished.
    """
    spaced = [merge for word in words for merge in word_merges(SPACE + word)]
    bare = [merge for word in starters for merge in word_merges(word)]
    bare.sort(key=lambda merge: -len(merge[0]))
    return list(dict.fromkeys([*spaced, (BREAK, BREAK), *bare]))


def byte_level_tokenizer(
    special: Sequence[str], markers: Sequence[str], words: Sequence[str], starters: Sequence[str]
) -> PreTrainedTokenizerFast:
    """The tokenizer; `special` ends with pad and the end of a turn, in this order."""
    merges = merges_for(words, starters)
    pieces = [*special, *markers, *sorted(ByteLevel.alphabet()), *map("".join, merges)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=cast("list[str]", merges),
        pad_token=special[0],
        unk_token=special[0],
        eos_token=special[-1],
        extra_special_tokens=list(special[1:-1]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in markers])
    return tokenizer
