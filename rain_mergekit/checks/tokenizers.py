"""Check that the three tokenizers agree, in particular on the thinking markers."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase

from rain_mergekit.checks.accept import refuse_unless_accepted
from rain_mergekit.errors import RainError
from rain_mergekit.models.tokenizer import has_tokenizer, tokenizer_in

LOG = logging.getLogger(__name__)


def check_tokenizers(
    folders: Mapping[str, str],
    names: Mapping[str, str],
    markers: Sequence[str],
    accept: Collection[str],
    *,
    trust_remote_code: bool | None = None,
) -> list[str]:
    """Refuse tokenizers that read the markers, or tokens at all, in another way.

    Args:
        folders: of the models, by role; those without a tokenizer are not compared.
        names: what to call the models, by role.
        markers: texts or tokens around thinking.
        accept: checks whose outcome is only a warning.
        trust_remote_code: whether tokenizers may be programs; if nobody knows, those that are
            are not compared.
    """
    load = partial(tokenizer_in, trust_remote_code=bool(trust_remote_code))
    with_one = {role for role, folder in folders.items() if has_tokenizer(folder)}
    for role in folders.keys() - with_one:
        LOG.info("the %s model comes without a tokenizer: not compared", role)
    if "reasoning" not in with_one or len(with_one) == 1:
        return []
    try:
        loaded = {role: load(folders[role], names[role]) for role in sorted(with_one)}
    except RainError as error:
        if trust_remote_code is not None:
            raise
        return [f"{error}: the tokenizers are not compared"]
    own = loaded.pop("reasoning")
    found: list[str] = []
    for role, other in loaded.items():
        problems = disagreements(own, other, f"the {role} model {names[role]}", markers)
        found += [refuse_unless_accepted("other_tokens", problem, accept) for problem in problems]
    return found


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
    """Whether `marker` is one added token of `own` and unknown to `other`, like its number."""
    if len(ids) != 1 or marker not in own.get_added_vocab() or marker in other.get_vocab():
        return False
    texts = {number: text for text, number in other.get_vocab().items()}
    return ids[0] not in texts or texts[ids[0]] in other.get_added_vocab()
