"""Which tokens of a reasoning sample the projection protects."""

from __future__ import annotations

from rain_mergekit.calibration.protected_positions import plan_streams
from rain_mergekit.calibration.samples import Samples
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.text.calibration_sets import DataSet
from rain_mergekit.text.markers import Markers
from rain_mergekit.text.token_positions import ReasoningTokens


def test_every_token_of_a_conversation_is_in_one_group() -> None:
    """Question, block, answer, question, block, answer: nothing is left out, nothing twice."""
    sample = ReasoningTokens(
        source="here",
        input_ids=tuple(range(20)),
        think_positions=(3, 4, 6, 12, 13, 15),
        content_positions=(5, 14),
        prompt_positions=(0, 1, 2, 9, 10, 11),
        response_positions=(7, 8, 16, 17, 18, 19),
        open_starts=(4, 13),
        open_ends=(5, 14),
        close_starts=(6, 15),
    )
    settings = RainSettings(
        reasoning_data="r.jsonl",
        fit="projection",
        projection="orthogonal",
        protect_prompt=0.5,
        protect_response=0.5,
        reading_share=0.9,
    )
    data = DataSet("r.jsonl", "", 1, (sample,), ())
    (plan,) = plan_streams(Samples(data, None, Markers()), settings)
    (groups,) = plan.positions
    kinds = ("think", "content", "prompt", "response")
    assert sorted(i for kind in kinds for i in groups[kind]) == list(range(20))
    assert groups["read prompt"] == groups["prompt"] == sample.prompt_positions
    assert groups["read response"] == groups["response"] == sample.response_positions
