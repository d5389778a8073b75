"""Do the three models read the markers, and tokens at all, in the same way?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

# Revisions of one tokenizer differ in a few added tokens; tokenizers of two families share texts,
# and next to none of their numbers.
_EQUAL_NUMBERS = 0.9


def disagreements(
    own: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, who: str, markers: Sequence[str]
) -> Iterator[str]:
    """One sentence for each way in which `other` reads tokens differently from `own`.

    A marker that is an added token of `own` and unknown to `other` is no disagreement where its
    number is free, or another added token's, in `other`: most published pairs are like that, and
    the merge leaves its embedding and its row of the output head alone.
    """
    one, two = own.get_vocab(), other.get_vocab()
    ordinary = one.keys() & two.keys() - own.get_added_vocab().keys()
    moved = sorted(text for text in ordinary if one[text] != two[text])
    if len(moved) > (1 - _EQUAL_NUMBERS) * len(ordinary) or not ordinary:
        example = f", such as {moved[0]!r}" if moved else ""
        yield (
            f"the tokenizer of the reasoning model and that of {who} give {len(moved)} of the "
            f"{len(ordinary)} tokens that both have different numbers{example}"
        )
        return
    for marker in markers:
        ids, theirs = (t.encode(marker, add_special_tokens=False) for t in (own, other))
        if ids != theirs and not _unknown(own, other, marker, ids):
            yield (
                f"the marker {marker!r} is {ids} to the reasoning model's tokenizer, and {theirs} "
                f"to that of {who}"
            )


def _unknown(
    own: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, marker: str, ids: Sequence[int]
) -> bool:
    """Whether `marker` is one added token here and means nothing there, nor does its number."""
    if len(ids) != 1 or marker not in own.get_added_vocab() or marker in other.get_vocab():
        return False
    texts = {number: text for text, number in other.get_vocab().items()}
    return ids[0] not in texts or texts[ids[0]] in other.get_added_vocab()
