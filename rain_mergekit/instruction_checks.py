"""Instructions that a rule can check, as IFEval writes them; `if-verifiable` has the rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rain_mergekit.checkpoint import first_line
from rain_mergekit.errors import RainError
from rain_mergekit.reading import StrPath, read_samples


@dataclass(frozen=True)
class Asked:
    """One prompt; `instructions` are the rules' ids with their arguments, often none."""

    source: str
    text: str
    instructions: tuple[tuple[str, Mapping[str, Any]], ...] = ()


def read_prompts(path: StrPath) -> list[Asked]:
    """Prompts from JSON or JSONL; `instruction_id_list` and `kwargs` are as in IFEval's files.

    Raises RainError naming file, line and field.
    """
    return read_samples(path, _parse)[1]


def _parse(source: str, value: object) -> Asked:
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise RainError(f"{source}: expected an object with a text `prompt`")
    ids = value.get("instruction_id_list") or []
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
        raise RainError(f"{source}: `instruction_id_list` must be a list of texts")
    given = value.get("kwargs")
    given = [{}] * len(ids) if given is None else given
    shaped = isinstance(given, list) and all(isinstance(one or {}, dict) for one in given)
    if not shaped or len(given) != len(ids):
        raise RainError(f"{source}: `kwargs` must be a list with one object for each instruction")
    return Asked(source, value["prompt"], tuple(zip(ids, map(_arguments, given), strict=True)))


def _arguments(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Without those that are null, as in files with a column for every rule's arguments."""
    found = {name: value for name, value in (given or {}).items() if value is not None}
    # The reader has all numbers as floats; the rules count with integers.
    return {n: int(v) if isinstance(v, float) and v.is_integer() else v for n, v in found.items()}


def check_rules(prompts: Sequence[Asked]) -> None:
    """RainError now rather than after generating, if a rule cannot be applied."""
    for prompt in prompts:
        follows(prompt, "Some text.")


def follows(asked: Asked, response: str) -> list[bool]:
    """For each of the prompt's instructions, whether the response follows it, strictly.

    An empty response follows none. Raises RainError without `if-verifiable`, for a rule that it
    does not have, and for arguments that the rule does not take or misses.
    """
    rules = _rules() if asked.instructions else {}
    return [
        bool(response.strip()) & _follows(rules, asked.source, name, arguments, response)
        for name, arguments in asked.instructions
    ]


def _follows(
    rules: Mapping[str, Any], source: str, name: str, arguments: Mapping[str, Any], response: str
) -> bool:
    if name not in rules:
        raise RainError(f"{source}: there is no rule {name!r} (known: {', '.join(sorted(rules))})")
    rule = rules[name](name)
    # A rule without its arguments makes them up by chance.
    if missing := sorted(set(rule.get_instruction_args_keys()) - set(arguments)):
        raise RainError(f"{source}: rule {name!r} needs {', '.join(missing)} in `kwargs`")
    try:
        rule.build_description(**arguments)
        return bool(rule.check_following(response))
    except LookupError:
        raise RainError(
            f"{source}: rule {name!r} needs data of nltk: fetch it with "
            "`python -m nltk.downloader punkt_tab`"
        ) from None
    except (TypeError, ValueError) as error:
        raise RainError(f"{source}: rule {name!r}: {first_line(error)}") from None


def _rules() -> Mapping[str, Any]:
    """IFEval's rules by their ids; loaded when the first prompt needs them."""
    try:
        import langdetect  # noqa: PLC0415 - part of the extra
        from if_verifiable.ifeval import INSTRUCTION_DICT  # noqa: PLC0415
    except ImportError as error:
        raise RainError(
            f"the prompts carry instructions, but their rules cannot be loaded ({error}): "
            "pip install 'rain-mergekit[ifeval]'"
        ) from None
    langdetect.DetectorFactory.seed = 0  # else the same text may be of two languages
    rules: Mapping[str, Any] = INSTRUCTION_DICT
    return rules
