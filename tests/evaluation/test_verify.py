"""`verify`: drift layer by layer against whole models, rounding, answers, and rules."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import astuple, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import architectures
import dense
import pytest
import torch
from commands import TRIO, needs_rules, refused, run, succeed
from mergekit.common import ModelReference
from merging import merge
from tiny import Tiny, linear_inputs
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rain_mergekit.capture import next_tokens
from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.capture.output_head import finishing
from rain_mergekit.data_building.tasks import Written
from rain_mergekit.errors import RainError
from rain_mergekit.evaluation.answer_measures import Measured, Reading, measure
from rain_mergekit.evaluation.answers import Behaviour, behaviour, worse
from rain_mergekit.evaluation.divergence import Drift, Place
from rain_mergekit.evaluation.layerwise_drift import VerifyOptions
from rain_mergekit.evaluation.marker_distance import REACH
from rain_mergekit.evaluation.verify import measure_merge, verdict
from rain_mergekit.instructions.prompts import Asked, Instruction, read_prompts
from rain_mergekit.instructions.rules import follows
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.loading import LoadOptions
from rain_mergekit.text.calibration_sets import load_reasoning
from rain_mergekit.text.markers import Markers
from rain_mergekit.text.token_positions import ReasoningTokens

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
HOW = VerifyOptions(LoadOptions())


def checkpoint(path: Path) -> Checkpoint:
    return Checkpoint.open(ModelReference.model_validate({"model": {"path": str(path)}}))


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Three bfloat16 models, and what mergekit makes of them in bfloat16 and in float32."""
    folder = tmp_path_factory.mktemp(request.param)
    made = Tiny.make(folder, request.param, torch.bfloat16)
    made.calibrate()
    for dtype in ("bfloat16", "float32"):
        merge(folder / dtype, made.content(dtype=dtype)).weights()
    return made


def samples_of(tiny: Tiny) -> tuple[ReasoningTokens, ...]:
    path = tiny.folder / "reasoning.jsonl"
    return load_reasoning(path, tiny.tokenizer(), keep_response=True).samples


def whole(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def features(folder: Path, samples: tuple[ReasoningTokens, ...]) -> dict[str, Tensor]:
    """Inputs of every linear module at think positions, from whole forward passes."""
    model, parts = whole(folder), dict[str, list[Tensor]]()
    for sample in samples:
        with linear_inputs(model) as inputs, torch.no_grad():
            model(input_ids=torch.tensor([sample.input_ids]))
        for name, rows in inputs.items():
            parts.setdefault(name, []).append(rows[list(sample.think_positions)].double())
    return {name: torch.cat(rows) for name, rows in parts.items()}


def test_layer_by_layer_equals_whole_forward_passes(tiny: Tiny) -> None:
    samples, folder = samples_of(tiny), tiny.folder
    merged = folder / "bfloat16" / "merged"
    found = measure_merge(checkpoint(folder / "reasoning"), checkpoint(merged), samples, HOW)
    before, after, exact = (
        features(place, samples)
        for place in (folder / "reasoning", merged, folder / "float32" / "merged")
    )
    sites = 0
    for index, layer in enumerate(found.layers):
        for site, numbers in layer.items():
            name, sites = f"model.layers.{index}.{site}", sites + 1
            energies = (before[name], after[name] - before[name], after[name] - exact[name])
            expected = [float(rows.square().sum()) for rows in energies]
            got = [numbers.reference, numbers.drift, numbers.rounding]
            assert got == pytest.approx(expected, rel=2e-3, abs=1e-6)
    assert sites == 8  # four input sites in each of two layers
    last = found.layers[-1]["mlp.down_proj"]
    assert 0 < (last.rounding_share or 0) < 0.01
    assert last.relative == pytest.approx((last.drift / last.reference) ** 0.5)


def test_next_tokens_equal_those_of_whole_models(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_tokens, "CHUNK_LOGITS", 16 * 400)  # several chunks of 16 positions
    samples, folder = samples_of(tiny), tiny.folder
    places = [folder / "reasoning", folder / "bfloat16/merged", folder / "float32/merged"]
    found = measure_merge(checkpoint(places[0]), checkpoint(places[1]), samples, HOW)
    models = [dense.whole(place) for place in places]
    for one, model in ((found.drift, models[1]), (found.unrounded, models[2])):
        expected = dense.means(models[0], model, samples)
        assert one is not None
        for place in ("think", "content", "rest"):
            value = getattr(one, place)
            assert value.positions == expected.positions[place]
            assert value.mean == pytest.approx(expected.mean[place], rel=1e-3, abs=1e-7)
        assert one.worst_source == expected.worst_source


def test_a_merge_without_the_padding_of_the_vocabulary(tmp_path: Path) -> None:
    """As mergekit writes it with `tokenizer: {source: base}`: 330 of 400 rows have a token."""
    tiny = Tiny.make(tmp_path / "trio", "llama")
    tiny.calibrate()
    content = tiny.content(tokenizer={"source": "base"})
    places = tiny.folder / "reasoning", merge(tmp_path / "run", content).folder
    samples, models = samples_of(tiny), [checkpoint(place) for place in places]
    found = measure_merge(*models, samples, HOW)
    expected, count = 0.0, 0
    for sample in samples:
        with torch.no_grad():
            own, other = (
                whole(place)(torch.tensor([sample.input_ids])).logits[0].double()
                for place in places
            )
        assert (own.shape[1], other.shape[1]) == (400, 330)
        p, q = own[:, :330].softmax(-1), other.softmax(-1)
        apart = (p * (p / q).log()).sum(-1)[list(sample.think_positions)]
        expected, count = expected + float(apart.sum()), count + len(apart)
    assert found.drift.think.mean == pytest.approx(expected / count, rel=1e-3)
    assert found.unrounded is not None
    path = places[1] / "tokenizer.json"
    path.write_text(path.read_text().replace('": 100,', '": 101,', 1))
    with pytest.raises(
        RainError, match=r"vocabularies differ .400 tokens in .* not only in padding"
    ):
        measure_merge(*models, samples, HOW)


def test_drift_by_distance_from_the_markers(tiny: Tiny) -> None:
    """Against the logits of whole models, at the places where the markers' own tokens stand."""
    samples, folder = samples_of(tiny), tiny.folder
    places = [folder / "reasoning", folder / "bfloat16/merged"]
    found = measure_merge(*map(checkpoint, places), samples, HOW).around
    models, tokenizer = [whole(place) for place in places], tiny.tokenizer()
    expected: dict[str, dict[int, list[float]]] = {"open": {}, "close": {}}
    for sample in samples:
        ids = torch.tensor([sample.input_ids])
        with torch.no_grad():
            p, q = (model(input_ids=ids).logits[0].double().log_softmax(-1) for model in models)
        apart = (p.exp() * (p - q)).sum(-1).tolist()
        opened, closed = (
            sample.input_ids.index(tokenizer.convert_tokens_to_ids(text))
            for text in ("<think>", "</think>")
        )
        for at, value in enumerate(apart):
            if at < closed and abs(at - opened) <= REACH:
                expected["open"].setdefault(at - opened, []).append(value)
            if at > opened and abs(at - closed) <= REACH:
                expected["close"].setdefault(at - closed, []).append(value)
    for name, values in expected.items():
        got = getattr(found, name)
        assert set(got) == set(values)
        assert len(got) > 12
        for distance, numbers in values.items():
            spread = (fmean(numbers), min(numbers), max(numbers))
            assert astuple(got[distance]) == pytest.approx(spread, rel=1e-3, abs=1e-6)


def test_hidden_states_that_find_no_room_in_memory(tiny: Tiny) -> None:
    samples, folder = samples_of(tiny), tiny.folder
    models = checkpoint(folder / "reasoning"), checkpoint(folder / "bfloat16/merged")
    small = replace(HOW, budget=0)
    assert measure_merge(*models, samples, small) == measure_merge(*models, samples, HOW)


def test_a_model_beside_itself(tiny: Tiny) -> None:
    samples, seen = samples_of(tiny), list[int]()
    model = checkpoint(tiny.folder / "reasoning")
    found = measure_merge(model, model, samples, HOW, seen.append)
    assert sum(seen) == 2 * sum(len(sample.input_ids) for sample in samples)
    assert all(site.drift == 0 for layer in found.layers for site in layer.values())
    assert all(site.rounding_share is None for layer in found.layers for site in layer.values())
    assert found.drift.think.mean == 0
    assert "mergekit_config.yml" in str(found.unknown)


# What may follow the layers besides norm and matrix: softcap, logit scale, tied or own matrix
HEADS: Mapping[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8, "num_key_value_heads": 2},
    "granite": {"logits_scaling": 7.0, "num_key_value_heads": 2},
    "cohere": {"logit_scale": 0.3, "num_key_value_heads": 2},
    "llama": {"tie_word_embeddings": False, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("family", HEADS)
def test_what_follows_the_layers_is_the_models_own(family: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        family,
        vocab_size=90,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        **HEADS[family],
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    ids, last = torch.arange(1, 21)[None], list[Tensor]()
    model.model.layers[-1].register_forward_hook(
        lambda _m, _a, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0]
    layerwise = LayerwiseModel.open(checkpoint(tmp_path), config, torch.float32, "cpu")
    for _ in range(2):  # it leaves the model as it was
        with finishing(layerwise) as logits:
            parts = [logits(part) for part in last[0].reshape(20, 32).split(7)]
            assert torch.allclose(torch.cat(parts), expected, atol=1e-5)
        assert all(parameter.is_meta for parameter in layerwise.model.parameters())
        assert len(list(layerwise.record([[1, 2, 3]]))) == 1


# Rounding


# Experts in one tensor of the model: of a checkpoint that holds one each, as mergekit's table asks
# for them; and by the model's own names, of a family that begins with a dense layer.
@pytest.mark.parametrize("family", ["mixtral", "glm4_moe"])
def test_rounding_of_experts(family: str, tmp_path: Path) -> None:
    tiny = architectures.make(tmp_path, family).using(
        coefficients="off", projection="oblique", rank_by="energy", rank_share=0.9
    )
    tiny.calibrate()
    samples = samples_of(tiny)
    rounded, exact = (
        merge(tmp_path / dtype, tiny.content(dtype=dtype)).folder
        for dtype in ("bfloat16", "float32")
    )
    reasoning = checkpoint(tmp_path / "reasoning")
    found = measure_merge(reasoning, checkpoint(rounded), samples, HOW)
    expected = dense.means(dense.whole(tmp_path / "reasoning"), dense.whole(exact), samples)
    for place, wanted in expected.mean.items():
        assert getattr(found.unrounded, place).mean == pytest.approx(wanted, rel=1e-3, abs=1e-7)
        assert getattr(found.drift, place).mean != pytest.approx(wanted, rel=1e-3, abs=1e-7)
    last = list(found.layers[-1].values())[-1]
    assert 0 < (last.rounding_share or 0) < 0.1


def test_why_rounding_is_not_known(tiny: Tiny, tmp_path: Path) -> None:
    samples, folder = samples_of(tiny)[:1], tiny.folder
    reasoning = checkpoint(folder / "reasoning")

    def reason(place: Path, how: VerifyOptions = HOW) -> str:
        found = measure_merge(reasoning, checkpoint(place), samples, how)
        assert found.unrounded is None
        assert all(site.rounding is None for site in found.layers[-1].values())
        return str(found.unknown)

    merged = folder / "bfloat16" / "merged"
    assert "--dtype float32" in reason(merged, replace(HOW, dtype=torch.bfloat16))
    parameters = {"calibration": str(tiny.path), "lambda": [0.5, 1.0]}
    merge(tmp_path / "slope", tiny.content(parameters=parameters)).weights()
    assert "lambda is [0.5, 1.0], not one number" in reason(tmp_path / "slope" / "merged")


# mergekit-rain verify

DATA = TRIO / "reasoning.jsonl"


def verify(merged: Path, *options: object) -> tuple[object, ...]:
    return ("verify", merged, "--against", TRIO / "reasoning", "--reasoning-data", DATA, *options)


def test_verify_shows_layers_and_answers() -> None:
    outcome = run(*verify(TRIO / "instruct", "--samples", 3, "--generate", 12))
    assert outcome.code == 3
    lines = outcome.output.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:1] == ["layer"])
    assert lines[head].split() == ["layer", "q_proj", "o_proj", "gate_proj", "down_proj"]
    layers = json.loads((TRIO / "reasoning/config.json").read_text())["num_hidden_layers"]
    assert [line.split()[0] for line in lines[head + 1 : head + 1 + layers]] == [
        str(index) for index in range(layers)
    ]
    assert "Rounding's part of the drift is not known" in outcome.output
    row = next(line for line in lines if "without a thinking block" in line)
    assert row.split()[-2:] == ["0", "12"]


def test_verify_says_when_answers_were_cut() -> None:
    options = ("--samples", 2, "--generate", 3, "--max-new-tokens", 8)
    said = succeed(*verify(TRIO / "reasoning", *options))
    assert "3 of 3 answers were cut off while thinking at 8 tokens" in said
    assert "Verdict: the thinking format is kept" in said


# Behaviour

GOOD = "<think>a b</think>an answer"
READING = Reading(Markers(), opened_by_template=False)


def measured(text: str, asked: Asked | None = None, *, finished: bool = True) -> Measured:
    return measure(asked or Asked("s", "p"), Written(text, None, finished), READING)


def test_behaviour_counts() -> None:
    texts = ["plain", GOOD, "<think>a", "<think></think>an answer", GOOD * 2]
    answers = [*map(measured, texts), measured("<think>a", finished=False)]
    found = behaviour(answers)
    assert (found.unopened, found.unclosed, found.cut, found.empty) == (1, 1, 1, 1)
    assert found.broken == 3
    assert found.several == 1
    assert found.tokens == answers[1].thinking
    assert found.asked == found.instructions == 0


def counts(prompts: int, unclosed: int = 0, cut: int = 0, **more: Any) -> Behaviour:
    return replace(Behaviour(prompts, 0, unclosed, 0, cut, None, 0, 0, 0, 0), **more)


CALM = Drift(Place(0, 1), Place(0, 1), Place(0, 1), 1, "", 0.0)


@pytest.mark.parametrize(
    ("merged", "reasoning", "seen"),
    [
        (counts(50), counts(50), []),
        (counts(50, 1), counts(50), []),
        (counts(50, 10), counts(50), ["broken blocks"]),
        (counts(50, 10), counts(50, 9), []),
        (counts(4, 4), counts(4), ["broken blocks"]),
        (counts(50, cut=50), counts(50), ["cut off while thinking"]),
        (counts(50, cut=50), counts(50, cut=50), []),
        (counts(50, looped=10), counts(50), ["loops"]),
        (counts(50, looped=1), counts(50), []),
        (counts(50, several=9), counts(50), ["several blocks"]),
        (counts(50, switched=9), counts(50), ["other language"]),
        (counts(50, keys=40, correct=20), counts(50, keys=40, correct=35), ["right answers"]),
        (counts(50, keys=40, correct=30), counts(50, keys=40, correct=35), []),
        (counts(50, keys=40, correct=35), counts(50, keys=40, correct=20), []),
        (counts(9, asked=9, obedient=1), counts(9, asked=9, obedient=9), ["instructions followed"]),
        (counts(50, looped=9, switched=9), counts(50), ["loops", "other language"]),
    ],
)  # fmt: skip
def test_worse_beyond_chance(merged: Behaviour, reasoning: Behaviour, seen: list[str]) -> None:
    assert [count.name for count in worse(merged, reasoning)] == seen
    assert verdict(CALM, merged, reasoning) == ("damaged" if seen else "kept")
    assert verdict(CALM, None, None) == verdict(None, counts(9), counts(9)) == "kept"


def test_chance_seldom_calls_a_merge_worse() -> None:
    """Two models that are alike: of 7 counts together, less than 5 % of pairs differ."""
    torch.manual_seed(0)
    rates = torch.tensor([0.1, 0.1, 0.05, 0.1, 0.1, 0.6, 0.5])
    drawn = torch.binomial(torch.full((400, 2, 7), 60.0), rates.expand(400, 2, 7)).int().tolist()
    named = ("unclosed", "several", "looped", "empty", "switched", "correct", "obedient")
    pairs = [
        [counts(60, keys=60, asked=60, **dict(zip(named, row, strict=True))) for row in pair]
        for pair in drawn
    ]
    assert sum(bool(worse(*pair)) for pair in pairs) < 0.05 * len(pairs)


def test_answers_of_twice_the_length_are_a_risk() -> None:
    short, long = counts(9, middle=50.0), counts(9, middle=100.0)
    assert verdict(CALM, long, short) == "at risk"
    assert verdict(CALM, replace(long, middle=99.0), short) == "kept"
    assert verdict(CALM, short, long) == verdict(CALM, long, counts(9)) == "kept"


def test_verify_without_any_file() -> None:
    """Prompts that come with the package, far beyond these words: their blocks break or loop."""
    options = ("--generate", 3, "--max-new-tokens", 24, "--json")
    outcome = run("verify", TRIO / "instruct", "--against", TRIO / "reasoning", *options)
    found = json.loads(outcome.stdout)
    assert (found["format"], found["version"]) == ("mergekit-rain verify", 1)
    assert found["divergence"] is None
    assert found["answers"]["merged"]["prompts"] == 3
    assert "broken blocks 3 of 3" in found["measured"]
    assert run("verify", "a", "--against", "b", "--card").code == 2


def test_verify_for_programs() -> None:
    outcome = run(*verify(TRIO / "reasoning", "--samples", 2, "--json"))
    found = json.loads(outcome.stdout)
    assert found["verdict"] == "kept"
    assert found["divergence"]["drift"]["think"]["mean"] == 0
    assert len(found["divergence"]["layers"]) == 4
    assert found["measured"] == "L_think 0; answers not measured (--generate)"


# Rules

CASES = [
    ("punctuation:no_comma", {}, "No such thing.", "One, two."),
    ("keywords:existence", {"keywords": ["tin"]}, "A tin cup.", "A cup."),
    ("keywords:forbidden_words", {"forbidden_words": ["tin"]}, "A cup.", "A tin cup."),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "a b c", "a b"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2.0}, "* a\n* b", "* a"),
    ("detectable_format:json_format", {}, '{"a": 1}', "a"),
    ("startend:end_checker", {"end_phrase": "Bye."}, "So. Bye.", "Bye. So."),
    ("startend:quotation", {}, '"all of it"', "all of it"),
    ("detectable_format:title", {}, "<<One>> text", "text"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "a\n\nThen b",
        "a\n\nnow b",
    ),
]


def prompts(folder: Path, **fields: Any) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "Say it.", **fields}) + "\n")
    return path


@needs_rules
@pytest.mark.parametrize(("rule", "arguments", "good", "bad"), CASES, ids=[c[0] for c in CASES])
def test_rules(rule: str, arguments: dict[str, Any], good: str, bad: str, tmp_path: Path) -> None:
    kwargs = [{**arguments, "prompt_to_repeat": None, "num_sections": None}]
    (asked,) = read_prompts(prompts(tmp_path, instruction_id_list=[rule], kwargs=kwargs))
    assert [follows(asked, text) for text in (good, bad, " ")] == [[True], [False], [False]]


@needs_rules
def test_only_the_response_after_a_closed_block_is_checked() -> None:
    asked = Asked(
        "s", "p", (Instruction("punctuation:no_comma"), Instruction("startend:quotation"))
    )
    texts = [
        "<think>a, b</think>none here",
        '<think>a, b</think>"all"',
        '<think>"none here"',
        '"all"',
    ]
    found = behaviour([measured(text, asked) for text in texts])
    assert (found.asked, found.obedient, found.instructions, found.followed) == (4, 1, 8, 3)


@needs_rules
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"instruction_id_list": ["x:y"]}, "there is no rule 'x:y' (known: change_case:"),
        ({"instruction_id_list": ["startend:end_checker"]}, "needs end_phrase in `kwargs`"),
        (
            {
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"num_words": 3, "relation": "about"}],
            },
            "relation",
        ),
        (
            {"instruction_id_list": ["startend:quotation"], "kwargs": [{"size": 3}]},
            "unexpected keyword",
        ),
        ({"instruction_id_list": "startend:quotation"}, "must be a list"),
        ({"instruction_id_list": ["a"], "kwargs": []}, "one object for each instruction"),
        ({"prompt": 3}, "field 'prompt' must be a string"),
    ],
)
def test_prompts_that_cannot_be_used(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    options = ("--samples", 1, "--generate", 1, "--prompts", prompts(tmp_path, **fields))
    assert message in refused(tmp_path, *verify(TRIO / "reasoning", *options))


def test_rules_without_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "if_verifiable.ifeval", None)
    with pytest.raises(RainError, match=r"pip install 'rain-mergekit\[ifeval\]'"):
        follows(Asked("s", "p", (Instruction("startend:quotation"),)), "text")
    own = Instruction("start:phrase", {"phrase": "te"})
    assert follows(Asked("s", "p", (own,)), "text") == [True]
    assert follows(Asked("s", "p"), "text") == []


@needs_rules
def test_rules_that_need_data_of_nltk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import nltk  # noqa: PLC0415 - only where there are rules

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    kwargs = {"num_sentences": 1, "relation": "at least"}
    rule = Instruction("length_constraints:number_sentences", kwargs)
    with pytest.raises(RainError, match=r"nltk\.downloader punkt_tab"):
        follows(Asked("s", "p", (rule,)), "One. Two.")
