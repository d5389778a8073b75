"""IFEval's rules, from the library `if-verifiable`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rain_mergekit.errors import RainError
from rain_mergekit.system.untrusted_input import first_line


def load(source: str) -> Mapping[str, Any]:
    """The rules by their ids; RainError if the library is missing."""
    try:
        import langdetect  # noqa: PLC0415 - part of the extra
        from if_verifiable.ifeval import INSTRUCTION_DICT  # noqa: PLC0415
    except ImportError as error:
        raise RainError(
            f"{source}: the prompt carries instructions, but their rules cannot be loaded "
            f"({error}): pip install 'rain-mergekit[ifeval]'"
        ) from None
    langdetect.DetectorFactory.seed = 0  # else the same text may be of two languages
    rules: Mapping[str, Any] = INSTRUCTION_DICT
    return rules


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
    except LookupError:
        raise RainError(
            f"{where}: rule {name!r} needs data of nltk: fetch it with "
            "`python -m nltk.downloader punkt_tab`"
        ) from None
    except (TypeError, ValueError, AttributeError, re.error) as error:  # keywords are patterns
        raise RainError(f"{where}: rule {name!r}: {first_line(error)}") from None
