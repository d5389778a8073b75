"""The `rain:` section: defaults, limits, and one clear message for each mistake."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rain_mergekit.config.presets import PRESETS, beside
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.config.settings_parser import parse_settings
from rain_mergekit.errors import RainError

SETS = {"reasoning_data": "r.jsonl", "instruction_data": "i.jsonl"}


def parse(**changes: Any) -> RainSettings:
    return parse_settings({**SETS, **changes}, "my.yml")


def test_two_paths_are_enough() -> None:
    settings = parse()
    assert (settings.projection, settings.rank_by, settings.rank_share) == (
        "oblique",
        "response_energy",
        0.99,
    )
    assert (settings.markers, settings.marker_texts) == ("auto", None)
    assert settings.chat_template_kwargs == {}
    assert settings.coefficients == "off"
    assert settings.needs_instruction_data


@pytest.mark.parametrize("name", ["coefficients", "lm_head"])
@pytest.mark.parametrize("word", ["off", "'off'", "no", "false"])
def test_off_means_off_however_yaml_reads_it(word: str, name: str) -> None:
    section = yaml.safe_load(f"{{reasoning_data: r, instruction_data: i, {name}: {word}}}")
    if word == "'off'" or section[name] is False:
        assert getattr(parse_settings(section, "my.yml"), name) == "off"


def test_without_instruction_data_only_what_needs_none_is_allowed() -> None:
    kept = {"reasoning_data": "r", "fit": "projection", "projection": "orthogonal"}
    assert not parse_settings(kept, "my.yml").needs_instruction_data
    assert not parse_settings({**kept, "lm_head": "all"}, "my.yml").needs_instruction_data
    changes = ({"projection": "oblique"}, {"coefficients": "normalized"}, {"lm_head": "unseen"})
    for change in changes:
        with pytest.raises(RainError, match=r"my\.yml: rain: instruction_data is missing"):
            parse_settings({**kept, **change}, "my.yml")


NAN, INF = float("nan"), float("inf")
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"reasoning_data": None}, "reasoning_data"),
    ({"reasoning_data": 3}, "reasoning_data"),
    ({"windw": 3}, "unknown setting 'windw', did you mean 'window'.* .*window"),
    ({"window": -1}, "window"),
    ({"window": 2.5}, "window"),
    ({"window": "many"}, "window: .*got 'many'"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"markers": {"open": "", "close": "b"}}, r"markers\.0\.open"),
    ({"markers": {"open": "<t>"}}, r"markers\.0\.close: Field required"),
    (
        {"markers": {"opens": "<t>"}},
        r"unknown setting 'markers\.0\.opens', did you mean 'open'\? \(known: open, close\)",
    ),
    ({"markers": [{"open": "a", "close": "b"}, {"open": "a"}]}, r"markers\.1\.close"),
    ({"markers": []}, "markers: a pair of texts, or auto, or none, is expected"),
    ({"markers": "<think>"}, "markers: Input should be 'auto' or 'none', got '<think>'"),
    ({"markers": None}, "markers"),
    ({"markers": 5}, "markers"),
    ({"chat_template_kwargs": ["enable_thinking"]}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs: tools cannot be set here"),
    ({"projection": "parallel"}, "projection: .*oblique.*orthogonal.*got 'parallel'"),
    ({"rank_by": "entropy"}, "rank_by"),
    ({"rank_by": "count"}, "rank_by: count needs `rank_count`"),
    ({"rank_share": 0}, "rank_share"),
    ({"rank_share": 1.01}, "rank_share"),
    ({"rank_share": NAN}, "rank_share"),
    ({"rank_tolerance": 1.0}, "rank_tolerance"),
    ({"rank_tolerance": NAN}, "rank_tolerance"),
    ({"rank_count": 0}, "rank_count"),
    ({"max_rank": -5}, "max_rank"),
    ({"size_budget": 0.0}, "size_budget"),
    ({"epsilon": 0.0}, "epsilon"),
    ({"epsilon": NAN}, "epsilon"),
    ({"epsilon": INF}, "epsilon"),
    ({"ridge": -0.1}, "ridge"),
    ({"ridge": INF}, "ridge"),
    ({"instruction_rows": 0}, "instruction_rows"),
    ({"protect_thinking": -1}, "protect_thinking"),
    ({"protect_thinking": NAN}, "protect_thinking"),
    ({"protect_prompt": -0.5}, "protect_prompt"),
    ({"protect_response": INF}, "protect_response"),
    ({"content_rows": 0}, "content_rows"),
    ({"lm_head": True}, "lm_head: .*'all' or 'unseen'"),
    ({"coefficients": "on"}, "coefficients"),
    ({"coefficients": True}, "coefficients"),
    ({"rho": -1}, "rho"),
    ({"alpha_min": 2.0, "alpha_max": 1.0}, "alpha_min must not be above alpha_max"),
    ({"alpha_max": INF}, "alpha_max"),
    ({"leakage_from_thinking": "perhaps"}, "leakage_from_thinking"),
    ({"preset": "Paper"}, "preset: Input should be 'paper' or 'published'"),
    ({"preset": ["paper"]}, "preset"),
    ({"preset": "paper", "rho": -1}, "rho"),
    ({7: "a number as a name"}, "7"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_each_mistake_has_one_message_naming_file_and_field(
    change: dict[str, Any], message: str
) -> None:
    section = {**SETS, **change}
    if change.get("reasoning_data", 0) is None:
        del section["reasoning_data"]
    with pytest.raises(RainError, match=message) as caught:
        parse_settings(section, "my.yml")
    text = str(caught.value)
    assert text.startswith("my.yml: rain: ")
    assert "\n" not in text
    assert "pydantic" not in text


NUMBERS = [
    name
    for name, value in RainSettings.model_json_schema()["properties"].items()
    if {"integer", "number"} & {part.get("type") for part in value.get("anyOf", [value])}
]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [True, False])
def test_yes_is_no_number(name: str, *, value: bool) -> None:
    """YAML reads `yes` and `on` as true, and Python takes true for 1."""
    with pytest.raises(RainError, match=f"{name}: Input should be a number, got {value}"):
        parse(**{name: value})


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_is_its_settings_written_out(name: str) -> None:
    written = parse(**PRESETS[name].settings)
    assert parse(preset=name).numbers() == written.numbers()
    assert written.preset is None
    assert written.projection == "orthogonal"
    assert PRESETS[name].limits


def test_what_is_given_beside_a_preset_wins() -> None:
    settings = parse(preset="paper", coefficients=False, rank_share=0.8, rho=0.5)
    assert (settings.coefficients, settings.rank_share) == ("off", 0.8)
    assert beside(settings.model_dump(mode="json")) == ("coefficients", "rank_share")
    assert not beside(parse(preset="paper").model_dump(mode="json"))
    assert not beside(parse(rank_share=0.8).model_dump(mode="json"))


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(RainError, match=r"window.*rank_share"):
        parse(window=-1, rank_share=7)


@pytest.mark.parametrize("section", [None, [], "text", 3])
def test_a_missing_section_says_what_it_needs(section: object) -> None:
    with pytest.raises(RainError, match=r"my\.yml: the `rain:` section is missing.*reasoning_data"):
        parse_settings(section, "my.yml")


@given(
    st.dictionaries(
        st.one_of(st.sampled_from(sorted(RainSettings.model_fields)), st.text(), st.integers()),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=4,
        ),
        max_size=4,
    )
)
def test_anything_yaml_can_hold_gives_settings_or_one_message(section: dict[Any, Any]) -> None:
    try:
        settings = parse_settings({**SETS, **section}, "my.yml")
    except RainError as error:
        assert str(error).startswith("my.yml: rain: ")  # noqa: PT017 - either outcome is right
    else:
        # what was accepted is stored in the file and read back the same
        assert RainSettings.model_validate(settings.model_dump(mode="json")) == settings
