"""Find out which markers a model writes: from outputs, chat template and tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rain_mergekit.errors import RainError
from rain_mergekit.system.json_samples import StrPath, read_samples
from rain_mergekit.text.chat_template import ChatTemplate
from rain_mergekit.text.markers import KNOWN, Markers, first
from rain_mergekit.text.samples import parse_reasoning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def find_markers(
    path: StrPath,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Markers:
    """The known markers that the model of this tokenizer and this reasoning set writes.

    Looked at in this order, the first that shows markers decides: the verbatim outputs of the set;
    the opening that the chat template writes; what template and tokenizer contain. Raises
    RainError if none shows any, or one shows several kinds, or the file cannot be read.
    """
    outputs = _outputs(path)
    template = ChatTemplate(tokenizer, chat_template_kwargs or {})
    opened = _opened(template)
    found = _written(outputs, opened) or opened or _supported(tokenizer)
    if not found:
        raise RainError(
            f"{path}: no known thinking markers in its outputs, nor in the chat template and the "
            f"tokenizer of {template.name}; set rain.markers to the texts with which the model "
            "opens and closes its thinking"
        )
    if len(found) > 1:
        shown = "; ".join(str(markers) for markers in found)
        raise RainError(
            f"{path}: more than one kind of thinking markers in its outputs, or in the chat "
            f"template and the tokenizer of {template.name} ({shown}); set rain.markers to those "
            "that the model writes"
        )
    return found[0]


def written_markers(path: StrPath) -> Markers:
    """The known markers that a set's verbatim outputs show; `<think>` where that is not clear."""
    return _only(_written(_outputs(path), ()))


def shown_markers(
    tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any]
) -> list[Markers]:
    """The known markers that chat template or tokenizer show; empty: it does not think.

    RainError without a chat template.
    """
    template = ChatTemplate(tokenizer, chat_template_kwargs)
    return _opened(template) or _supported(tokenizer)


def tokenizer_markers(
    tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any]
) -> Markers:
    """The known markers of this model, without a set; `<think>` where that is not clear."""
    return _only(shown_markers(tokenizer, chat_template_kwargs))


def text_markers(*texts: str) -> Markers:
    """The known markers in these outputs; `<think>` where there are none, or of several kinds."""
    return _only(_written(texts, ()))


def _only(found: Sequence[Markers]) -> Markers:
    return found[0] if len(found) == 1 else Markers()


def _outputs(path: StrPath) -> list[str]:
    return [s.output for s in read_samples(path, parse_reasoning)[1] if s.output is not None]


def _written(outputs: Iterable[str], opened: Sequence[Markers]) -> list[Markers]:
    """The markers that open the outputs, or close them where the template opens the block."""
    seen: list[Markers] = []
    for text in outputs:
        places = {
            span: markers
            for markers in KNOWN
            if (span := first(text, markers.opens, 0, len(text))) is not None
        }
        if places:
            seen.append(places[min(places)])
        else:
            closed = (m for m in KNOWN if any(c in text for c in m.closes()))
            seen += [m for m in closed if m in opened or not m.loose]
    return _distinct(seen)


def _opened(template: ChatTemplate) -> list[Markers]:
    """The open marker that the template writes before the model continues."""
    try:
        head = template.render("probe", [{"role": "user", "content": "?"}])
    except RainError:
        return []  # the first sample's error message explains it
    return _distinct(markers for markers in KNOWN if markers.opening(head))


def _supported(tokenizer: PreTrainedTokenizerBase) -> list[Markers]:
    """The markers that have tokens in the tokenizer or occur in the template's source."""
    vocabulary, source = tokenizer.get_vocab(), str(tokenizer.chat_template)

    def known(markers: Markers) -> bool:
        words = markers.words
        return all(w in vocabulary for w in words) or all(w in source for w in words)

    return [markers for markers in KNOWN if known(markers)]


def _distinct(found: Iterable[Markers]) -> list[Markers]:
    return list(dict.fromkeys(found))
