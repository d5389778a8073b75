"""IFEval's and IFBench's rules, from the library `if-verifiable`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rain_mergekit.errors import RainError
from rain_mergekit.system.untrusted_input import first_line

_DATA = "punkt_tab averaged_perceptron_tagger_eng stopwords"


def ifeval(source: str) -> Mapping[str, Any]:
    """IFEval's rules by their ids; RainError if the library is missing."""
    try:
        import langdetect  # noqa: PLC0415 - part of the extra
        from if_verifiable.ifeval import INSTRUCTION_DICT  # noqa: PLC0415
    except ImportError as error:
        raise _missing(source, error) from None
    langdetect.DetectorFactory.seed = 0  # else the same text may be of two languages
    rules: Mapping[str, Any] = INSTRUCTION_DICT
    return rules


def ifbench(source: str) -> Mapping[str, Any]:
    """IFBench's rules by their ids; RainError if the library is missing."""
    try:
        with _nothing_fetched():
            from if_verifiable.ifbench import INSTRUCTION_DICT  # noqa: PLC0415
    except ImportError as error:
        raise _missing(source, error) from None
    rules: Mapping[str, Any] = INSTRUCTION_DICT
    return rules


@contextmanager
def _nothing_fetched() -> Iterator[None]:
    """nltk downloads nothing: IFBench's module fetches four data sets as it is imported.

    Few rules need them, and a message says how to get them.
    """
    import nltk  # noqa: PLC0415 - part of the extra

    kept, nltk.download = nltk.download, lambda *_args, **_options: False
    try:
        yield
    finally:
        nltk.download = kept


def _missing(source: str, error: ImportError) -> RainError:
    return RainError(
        f"{source}: the prompt carries instructions, but their rules cannot be loaded "
        f"({error}): pip install 'rain-mergekit[ifeval]'"
    )


def find(source: str, kind: str) -> Any:
    """The rule of that id, None if there is none; IFBench's are not loaded for IFEval's."""
    for load in (ifeval, ifbench):
        if (found := load(source).get(kind)) is not None:
            return found(kind)
    return None


def follows(rule: Any, where: str, kwargs: Mapping[str, Any], response: str) -> bool:
    """Whether the response follows the rule; RainError for arguments that are not the rule's."""
    name = rule.id
    # A rule without its arguments makes them up by chance.
    if missing := sorted(set(rule.get_instruction_args_keys()) - set(kwargs)):
        raise RainError(f"{where}: rule {name!r} needs {', '.join(missing)} in `kwargs`")
    try:
        rule.build_description(**kwargs)
        return bool(rule.check_following(response))
    except KeyError as error:
        raise RainError(f"{where}: rule {name!r} does not know {error}") from None
    except (IndexError, ZeroDivisionError):  # a text without the words that the rule looks at
        return False
    except LookupError:
        raise RainError(
            f"{where}: rule {name!r} needs data of nltk: fetch it with "
            f"`python -m nltk.downloader {_DATA}`"
        ) from None
    except (TypeError, ValueError, AttributeError, re.error) as error:  # keywords are patterns
        raise RainError(f"{where}: rule {name!r}: {first_line(error)}") from None
