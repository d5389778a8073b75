"""A word-level tokenizer that gives back verbatim what it was given."""

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BREAKS = ("\n", "\n\n")
UNKNOWN = "<unk>"


def _decoder(tight: Sequence[str]) -> decoders.Decoder:
    """Put spaces between words, but none next to breaks and markers."""
    closing = [decoders.Replace(f" {token}", token) for token in tight]
    opening = [decoders.Replace(f"{token} ", token) for token in tight]
    words = decoders.WordPiece(prefix="##", cleanup=False)
    return decoders.Sequence([words, decoders.Fuse(), *closing, *opening])


def _begins_with(token: str, index: int) -> processors.TemplateProcessing:
    """Text encoded by itself gets the begin token, as Llama's tokenizers do."""
    pattern = f"{token} $A", f"{token} $A {token} $B"
    return processors.TemplateProcessing(
        single=pattern[0], pair=pattern[1], special_tokens=[(token, index)]
    )


def word_level_tokenizer(
    special: Sequence[str], markers: Sequence[str], words: Sequence[str]
) -> PreTrainedTokenizerFast:
    """The tokenizer; `special` is pad, begin, others and the end of a turn, in this order."""
    pieces = dict.fromkeys([*special, *markers, UNKNOWN, *BREAKS, *words])
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    splits = [
        pre_tokenizers.Split(Regex("\\n+"), "isolated"),
        pre_tokenizers.Split(" ", "removed"),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = _decoder([*special, *markers, *BREAKS])
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in markers])
    tokenizer.post_processor = _begins_with(special[1], vocabulary[special[1]])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=special[1],
        eos_token=special[-1],
        pad_token=special[0],
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
