"""The tokenizer and the chat templates of a family."""

from transformers import PreTrainedTokenizerFast

from rain_mergekit.demo.formats import DECORATION
from testbed.judging.scoring import CLOSE, OPEN
from testbed.puzzles.bytelevel import byte_level_tokenizer
from testbed.puzzles.family import Family
from testbed.puzzles.wordlevel import word_level_tokenizer

ROLES = ("user", "assistant", "system")
OPENING = f"{OPEN}\n"
MARKERS = (OPEN, CLOSE)


def vocabulary(family: Family) -> list[str]:
    """Every word of the family, in an order that never changes."""
    spoken: list[str] = [*ROLES, family.surface.lead, ". : ; ?", *family.words]
    for constraint in family.constraints:
        spoken += [*constraint.known, *constraint.held_out, *constraint.parameters]
    plain = [word for text in spoken for word in text.replace("{}", " ").split()]
    answers = [word for text in family.words for word in text.split() if word.isalpha()]
    formats = {constraint.format for constraint in family.constraints}
    plain += [word.upper() for word in answers if "upper" in formats]
    plain += [word.title() for word in answers if "title" in formats]
    return list(dict.fromkeys([*plain, *sorted(DECORATION)]))


def build_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """The family's tokenizer; its chat template is set per role."""
    special, words = family.surface.special, vocabulary(family)
    if family.architecture == "llama":
        return word_level_tokenizer(special, MARKERS, words)
    starters = (*ROLES, family.surface.lead.split()[0], "it")
    return byte_level_tokenizer(special, MARKERS, words, starters)


def template_for(family: Family, role: str) -> str:
    """One model's chat template: only a reasoning model's opens the block, if any does."""
    opens = family.surface.opens_block and role == "reasoning"
    return family.surface.template.replace("OPENING", OPENING if opens else "")
