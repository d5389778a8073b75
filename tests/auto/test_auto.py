"""`mergekit-rain auto`: names in, a measured merge out; what cannot work is refused at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import model_hub
import pytest
import torch
import yaml
from commands import TRIO, Workplace, everything, make_models, make_workplace, refused, run, succeed
from safetensors.torch import load_file
from tiny import shard

from rain_mergekit.auto.own_set import write_own_set
from rain_mergekit.auto.request import Request, continued, keep
from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.commands.options import Loading, Talk
from rain_mergekit.config.merge_config import read_config
from rain_mergekit.data_building.prompts import packaged_prompts
from rain_mergekit.errors import RainError
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.header_copy import preview
from rain_mergekit.models.loading import parse_reference
from rain_mergekit.publish.layout import REQUEST


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def place(tmp_path: Path, models: Path) -> Workplace:
    return make_workplace(tmp_path / "place", models, samples=4)


def arguments(place: Workplace, *models: object, out: str = "out") -> list[object]:
    names = models or (place.model("reasoning"), place.model("instruct"))
    sets = ("--reasoning-data", place.folder / "reasoning.jsonl")
    sets += ("--instruction-data", place.folder / "instruction.jsonl")
    return ["auto", *names, "-o", place.folder / out, *sets]


def test_two_names_give_a_measured_merge(tmp_path: Path, models: Path) -> None:
    place = make_workplace(tmp_path / "place", models, samples=24)
    output = succeed(*arguments(place), "-y")
    out = place.folder / "out"
    for text in ("thinks in <think>", "stream matching", "memory: about", "Verdict:"):
        assert text in output
    config = read_config(out / "rain" / "rain.yml")
    assert config.settings.fit == "streams"
    assert config.merge.dtype == "bfloat16"
    counts = {name: len(lines(out, name)) for name in ("reasoning", "held-out", "instruction")}
    assert counts == {"reasoning": 16, "held-out": 8, "instruction": 24}
    assert "divergence from the reasoning model" in (out / "README.md").read_text()
    assert (out / "rain" / "report.html").read_text().startswith("<!DOCTYPE")

    again = place.folder / "again"
    succeed("merge", out / "rain" / "rain.yml", again, "--quiet")
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()

    before = everything(out)
    assert "is merged already" in succeed(*arguments(place), "-y")
    assert everything(out) == before
    goes_on(place, out)


def goes_on(place: Workplace, out: Path) -> None:
    """As if it had been ended while the merge was written."""
    whole = (out / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "config.json", "rain_verification.json"):
        (out / name).unlink()
    output = succeed(*arguments(place))  # it was agreed before
    assert "up to date: not calibrated again" in output
    assert "Verdict:" in output
    assert (out / "model.safetensors").read_bytes() == whole
    other = refused(place.folder, *arguments(place), "--lambda", "0.5", "-y")
    assert "was begun with other strength" in other


def lines(out: Path, name: str) -> list[str]:
    return (out / "rain" / f"{name}.jsonl").read_text().splitlines()


def test_three_names_for_the_papers_method(place: Workplace) -> None:
    names = [place.model(role) for role in ("reasoning", "instruct", "pretrained")]
    template = place.model("pretrained") / "chat_template.jinja"
    template.unlink()
    said = succeed(*arguments(place, *names), "-y", "--fit", "projection")
    assert "shows thinking markers" not in said
    assert read_config(place.folder / "out/rain/rain.yml").settings.fit == "projection"
    swapped = arguments(place, names[0], names[2], names[1], out="other")
    outcome = run(*swapped, "--fit", "projection")
    assert outcome.code == 2
    assert "instruct has a chat template and" in outcome.output
    assert "no terminal to ask for your agreement" in outcome.output


def test_nothing_is_written_before_it_is_agreed(place: Workplace) -> None:
    before = everything(place.folder)
    assert run(*arguments(place)).code == 2
    assert everything(place.folder) == before


def test_unsuitable_models_are_refused(place: Workplace) -> None:
    reasoning, instruct = place.model("reasoning"), place.model("instruct")

    def say(*names: object) -> str:
        return refused(place.folder, *arguments(place, *names), "-y")

    assert "model not found" in say(reasoning, "./nowhere")
    assert "is named twice" in say(reasoning, reasoning)
    name = "model.layers.0.mlp.down_proj.weight"
    place.change_weights("instruct", lambda w: w.update({name: w[name][:, 1:].contiguous()}))
    assert f"instruct: {name} is [144, 447], expected [144, 448]" in say(reasoning, instruct)
    place.change_json("instruct", "config.json", model_type="llama")
    assert "must share one family" in say(reasoning, instruct)
    (instruct / "config.json").write_text((reasoning / "config.json").read_text())
    torch.save(load_file(instruct / "model.safetensors"), instruct / "pytorch_model.bin")
    (instruct / "model.safetensors").unlink()
    assert "only safetensors checkpoints are read" in say(reasoning, instruct)
    for role in ("reasoning", "pretrained"):
        (place.model(role) / "chat_template.jinja").unlink()
    assert "has no chat template" in say(reasoning, place.model("pretrained"))


def test_a_model_that_does_not_think_is_refused(place: Workplace) -> None:
    for role in ("reasoning", "instruct"):
        path = place.model(role) / "tokenizer.json"
        path.write_text(path.read_text().replace("think>", "thinq>"))
    message = refused(place.folder, *arguments(place), "-y")
    assert "known thinking markers" in message


def test_packaged_sets_are_refused_where_the_tokenizer_cannot_read_them(place: Workplace) -> None:
    names = place.model("reasoning"), place.model("instruct")
    message = refused(place.folder, "auto", *names, "-o", place.folder / "out", "-y")
    assert "does not know the English" in message
    assert "--instruction-data and --reasoning-data or --prompts" in message


def test_too_little_room_is_said_before_anything_is_written(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No disk of a test is really full: the one number that says so is put in its place."""
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=1000))
    message = refused(place.folder, *arguments(place), "-y")
    assert "are needed there and 1000 bytes are free" in message


def test_usage(place: Workplace) -> None:
    reasoning = place.model("reasoning")
    assert "two or three models" in run("auto", reasoning, "-o", "x").output
    outcome = run("auto", reasoning, place.model("instruct"), "--fit", "projection", "-o", "x")
    assert outcome.code == 2
    assert "name it third, or leave out --fit" in " ".join(outcome.output.split())
    tags = ("--markers", "<tool_call>", "</tool_call>", "--blocks", "optional")
    outcome = run(*arguments(place, out="x")[:-2], *tags)
    assert outcome.code == 2
    assert "is in no set of the package" in " ".join(outcome.output.split())


def test_an_agent_may_be_named_first(tmp_path: Path) -> None:
    trio = TRIO
    stays = tmp_path / "stays.jsonl"
    samples = [
        {"prompt": f"{number} pears . a +3 . how many pears ? use brackets .", "output": output}
        for number, output in (("two", "answer : [ five pears ]"), ("one", "answer : four pears"))
    ]
    stays.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    sets = ("--reasoning-data", stays, "--instruction-data", trio / "reasoning.jsonl")
    models = (trio / "instruct", trio / "reasoning")
    options = ("--markers", "[", "]", "--blocks", "optional", "-y")
    output = succeed("auto", *models, "-o", tmp_path / "out", *sets, *options)
    assert "keeps [ … ]" in output
    assert "reasoning samples: 2 of 2 used" in output
    config = read_config(tmp_path / "out" / "rain" / "rain.yml")
    assert str(config.reasoning.model.path) == str((trio / "instruct").resolve())
    assert config.settings.blocks == "optional"


def test_own_set_is_written_by_the_reasoning_model(place: Workplace) -> None:
    prompts = place.folder / "prompts.jsonl"
    texts = [{"prompt": one["prompt"]} for one in place.samples("reasoning")[:3]]
    prompts.write_text("".join(json.dumps(one) + "\n" for one in texts))
    words = [one for one in arguments(place) if "reasoning-data" not in str(one)]
    words.remove(place.folder / "reasoning.jsonl")
    asked = ("--prompts", prompts, "--prompts", place.folder / "instruction.jsonl")
    outcome = run(*words, *asked, "--max-new-tokens", "96", "-y")
    # One layer of four writes no thinking: what is kept decides, and the reason is said.
    assert outcome.code in (0, 1, 3), outcome.output
    assert f"{3 + len(place.samples('instruction'))} prompts" in outcome.output


def test_own_set_asks_with_and_without_constraints(place: Workplace) -> None:
    """Answers of one token cannot be kept; how many were asked for is what counts here."""
    request = Request(models=(), fit="streams", strength=1.0, max_new_tokens=1)
    (place.folder / "rain").mkdir()
    loading = Loading(
        trust_remote_code=False,
        lora_merge_cache=None,
        lora_merge_dtype=None,
        transformers_cache=None,
    )
    how = RunOptions(), loading, Talk(quiet=True, verbosity=0)
    with pytest.raises(RainError, match=f"no answer of {len(packaged_prompts())} can be kept"):
        write_own_set(str(place.model("reasoning")), (), place.folder, request, how)


def test_headers_are_enough_before_the_download(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    enlarge(place)
    served = {f"acme/{role}": place.model(role) for role in ("reasoning", "instruct")}
    with model_hub.hub(served) as found:
        model_hub.use(found, monkeypatch, place.folder / "cache")
        words = arguments(place, *served)
        outcome = run(*words)
        assert outcome.code == 2, outcome.output
        assert "to download: " in outcome.output
        whole = sum((folder / "model.safetensors").stat().st_size for folder in served.values())
        assert found.sent("model.safetensors") <= 2 * 100_001 < whole / 2
        assert not (place.folder / "out").exists()
        succeed(*words, "-y")
    text = (place.folder / "out" / "rain" / "rain.yml").read_text()
    assert yaml.safe_load(text)["base_model"] == f"acme/reasoning@{model_hub.COMMIT}"


def enlarge(place: Workplace) -> None:
    """Type float32: more bytes than the client asks for with a header."""
    for role in ("reasoning", "instruct"):
        place.change_weights(role, lambda w: w.update({k: v.float() for k, v in w.items()}))


def test_a_preview_has_the_shapes_and_none_of_the_room(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, goal = place.model("reasoning"), place.folder / "preview"
    weights = load_file(folder / "model.safetensors")
    shard(folder)
    goal.mkdir()
    with model_hub.hub({"acme/reasoning": folder}) as found:
        model_hub.use(found, monkeypatch, place.folder / "cache")
        seen = preview(parse_reference("acme/reasoning"), goal, None, trust=False)
    assert seen.commit == model_hub.COMMIT
    assert seen.missing == sum(t.numel() * t.element_size() for t in weights.values())
    copy = Checkpoint.open(parse_reference(seen.folder))
    assert copy.shapes(sorted(weights)) == {n: tuple(t.shape) for n, t in weights.items()}
    used = sum(p.stat().st_blocks * 512 for p in goal.glob("*.safetensors"))
    assert used < seen.missing / 4


def test_models_with_adapters_are_left_to_a_configuration(place: Workplace) -> None:
    message = refused(place.folder, *arguments(place, place.model("reasoning"), "a/b+c/d"), "-y")
    assert "takes whole models" in message


def test_arguments_of_the_template_are_kept_as_they_are(tmp_path: Path) -> None:
    given = {"enable_thinking": True, "tools": [{"name": "add"}]}
    request = Request(("a", "b"), "streams", 1.0, chat_template_kwargs=given)
    keep(tmp_path, request)
    assert json.loads((tmp_path / REQUEST).read_text())["chat_template_kwargs"] == given
    assert continued(tmp_path, request)
    other = replace(request, chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(RainError, match="was begun with other chat_template_kwargs"):
        continued(tmp_path, other)
