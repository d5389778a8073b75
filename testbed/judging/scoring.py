"""Judging generated text by rule; no model and no torch in here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rain_mergekit.demo.formats import FORMATS, content
from rain_mergekit.text.markers import Markers
from rain_mergekit.text.thinking_blocks import Thought, split_thinking

OPEN, CLOSE = "<think>", "</think>"


def parse(output: str, opened: bool) -> Thought:
    """Take apart what came after a prompt; `opened` says that the prompt ended in the marker."""
    if not opened:
        return split_thinking(output, Markers(OPEN, CLOSE))
    # A second open marker inside an opened block is the model's own text here.
    thinking, marker, response = output.partition(CLOSE)
    return Thought(True, bool(marker), thinking.strip(), response.strip())


@dataclass(frozen=True)
class Score:
    """What one output did; `content_lost` is right thinking with a wrong answer after it."""

    accurate: bool
    followed: bool
    both: bool
    no_close: bool
    no_thinking: bool
    thinking_right: bool
    content_lost: bool
    thinking_words: int


def score(record: Mapping[str, Any], output: str, opened: bool) -> Score:
    """Judge one output against its record."""
    parsed = parse(output, opened)
    lead, answer = str(record["lead"]), list(record["answer"])
    led = parsed.response.startswith(lead + " ")
    words = parsed.response.removeprefix(lead).split() if led else []
    accurate = content(words) == set(answer)
    form = FORMATS[record["format"]] if record["format"] else None
    right = parsed.complete and parsed.thinking == record["thinking"]
    return Score(
        accurate=accurate,
        followed=form is not None and form.follows(words, record["parameter"], answer),
        both=parsed.response == record["expected_response"],
        no_close=parsed.opened and not parsed.closed,
        no_thinking=not parsed.opened or (parsed.closed and not parsed.thinking),
        thinking_right=right,
        content_lost=right and not accurate,
        thinking_words=len(parsed.thinking.split()),
    )


def share(scores: Sequence[Score], name: str) -> float:
    """Mean of one field, in percent where it is a yes or no."""
    if not scores:
        return float("nan")
    return fmean(float(getattr(one, name)) for one in scores)


def summary(records: Sequence[Mapping[str, Any]], scores: Sequence[Score]) -> dict[str, float]:
    """The numbers of one model; shares are between 0 and 1."""
    paired = list(zip(records, scores, strict=True))
    plain = [one for record, one in paired if not record["constraint"]]
    asked = [one for record, one in paired if record["constraint"]]
    unseen = [one for record, one in paired if record["held_out_wording"]]
    everyone = list(scores)
    return {
        "plain_accuracy": share(plain, "accurate"),
        "constrained_accuracy": share(asked, "accurate"),
        "followed": share(asked, "followed"),
        "both": share(asked, "both"),
        "followed_held_out": share(unseen, "followed"),
        "both_held_out": share(unseen, "both"),
        "miss": share(everyone, "no_close") + share(everyone, "no_thinking"),
        "no_close": share(everyone, "no_close"),
        "no_thinking": share(everyone, "no_thinking"),
        "thinking_right": share(everyone, "thinking_right"),
        "content_lost": share(everyone, "content_lost"),
        "thinking_words": share(everyone, "thinking_words"),
    }
