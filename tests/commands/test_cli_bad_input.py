"""Whatever is wrong with the input: one clear message, exit code 1, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Workplace, make_models, make_workplace, refused, succeed
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rain_mergekit.calibration_file.schema import VERSION
from rain_mergekit.system.staged_folder import staged_folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """A calibration file of the models and samples that every workplace here has."""
    place = make_workplace(tmp_path_factory.mktemp("calibrated"), models)
    succeed("calibrate", place.yaml)
    return place.calibration


@pytest.fixture
def place(tmp_path: Path, models: Path) -> Workplace:
    folder = tmp_path / "work"
    folder.mkdir()
    return make_workplace(folder, models)


def entry(model: str, role: str | None) -> dict[str, Any]:
    return {"model": f"@/{model}", "parameters": {} if role is None else {"role": role}}


INSTRUCT, PRETRAINED = entry("instruct", "instruct"), entry("pretrained", "pretrained")
TWICE = [INSTRUCT, entry("pretrained", "instruct")]
# Name -> what is changed in the configuration (@ is the folder), and what the message says.
CONFIGURATIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no calibration": (
        {"parameters": None},
        ("parameters.calibration is None", "expected the path"),
    ),
    "role missing": (
        {"models": [INSTRUCT, entry("pretrained", None)]},
        ("parameters.role is None", "expected 'instruct' or 'pretrained'"),
    ),
    "role unknown": (
        {"models": [entry("instruct", "teacher"), PRETRAINED]},
        ("parameters.role is 'teacher'",),
    ),
    "role twice": ({"models": TWICE}, ("role 'instruct' is given twice",)),
    "one other model": (
        {"models": [INSTRUCT]},
        ("expected exactly two besides base_model", "found 1"),
    ),
    "three other models": (
        {"models": [INSTRUCT, PRETRAINED, entry("third", None)]},
        ("expected exactly two besides base_model", "found 3"),
    ),
    "no models": ({"models": None}, ("mergekit cannot read this",)),
    "no base model": ({"base_model": None}, ("base_model is missing",)),
    "base model not there": (
        {"base_model": "@/nowhere"},
        ("nowhere", "expected a local folder or a hub name"),
    ),
    "another method": (
        {"merge_method": "linear"},
        ("merge_method is 'linear', expected 'rain'",),
    ),
    "no settings": ({"rain": None}, ("the `rain:` section is missing",)),
    "unknown setting": ({"rain": {"windw": 3}}, ("unknown setting 'windw'",)),
    "setting out of range": ({"rain": {"rank_share": 1.5}}, ("rank_share", "1.5")),
    "data not there": ({"rain": {"reasoning_data": "@/none.jsonl"}}, ("none.jsonl",)),
    "full basis": (
        {"rain": {"rank_by": "full", "projection": "orthogonal", "max_rank": 144}},
        ("model.layers.0.", "fills all 144 directions", "smaller rank_share, or max_rank"),
    ),
    "every sample too long": (
        {"rain": {"max_tokens": 10}},
        ("reasoning.jsonl", "none of its 6 samples can be used", "more than max_tokens = 10"),
    ),
}


def write(place: Workplace, changes: dict[str, Any]) -> None:
    place.write(**json.loads(json.dumps(changes).replace("@", str(place.folder))))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configuration(place: Workplace, name: str) -> None:
    changes, expected = CONFIGURATIONS[name]
    write(place, changes)
    message = refused(place.folder, "calibrate", place.yaml)
    for text in expected:
        assert text in message


@pytest.mark.parametrize("name", ["no calibration", "role twice", "base model not there"])
def test_configuration_of_a_merge(place: Workplace, name: str) -> None:
    changes, expected = CONFIGURATIONS[name]
    write(place, changes)
    message = refused(place.folder, "merge", place.yaml, place.folder / "deep" / "out")
    for text in expected:
        assert text in message


def test_configuration_that_is_no_yaml(place: Workplace) -> None:
    place.yaml.write_text("merge_method: [rain")
    assert "not valid YAML" in refused(place.folder, "calibrate", place.yaml)
    place.yaml.write_text("rain")
    assert "expected a mapping" in refused(place.folder, "calibrate", place.yaml)
    assert "nothing.yml" in refused(place.folder, "calibrate", place.folder / "nothing.yml")


# Samples


def no_markers(place: Workplace) -> tuple[str, ...]:
    samples = place.samples("reasoning")
    for sample in samples:
        sample["output"] = sample["output"].replace("<think>", "").replace("</think>", "")
    place.write_samples("reasoning", samples)
    return "reasoning.jsonl", "none of its 6 samples can be used", "'<think>'"


def absent_spans(place: Workplace) -> tuple[str, ...]:
    samples = place.samples("instruction")
    for sample in samples:
        sample["related_prompt_list"][0]["prompt_spans"] = ["in rhyme"]
    place.write_samples("instruction", samples)
    return "instruction.jsonl", "the prompt does not contain the span 'in rhyme'"


def empty_set(place: Workplace) -> tuple[str, ...]:
    (place.folder / "reasoning.jsonl").write_text("")
    return ("reasoning.jsonl",)


def not_json(place: Workplace) -> tuple[str, ...]:
    with (place.folder / "instruction.jsonl").open("a") as file:
        file.write("{oops\n")
    return ("instruction.jsonl:7",)


def missing_field(place: Workplace) -> tuple[str, ...]:
    samples = place.samples("reasoning")
    place.write_samples("reasoning", [*samples[:2], {"output": samples[2]["output"]}])
    return "reasoning.jsonl:3", "prompt"


@pytest.mark.parametrize("change", [no_markers, absent_spans, empty_set, not_json, missing_field])
def test_samples(place: Workplace, change: Callable[[Workplace], tuple[str, ...]]) -> None:
    expected = change(place)
    message = refused(place.folder, "calibrate", place.yaml)
    for text in expected:
        assert text in message


# Models


def no_chat_template(place: Workplace) -> tuple[str, ...]:
    (place.model("reasoning") / "chat_template.jinja").unlink()
    return ("has no chat template",)


def features_not_finite(place: Workplace) -> tuple[str, ...]:
    name = "model.layers.0.post_attention_layernorm.weight"
    place.change_weights("reasoning", lambda weights: weights[name].fill_(3e38))
    return "model.layers.0.mlp.gate_proj", "reasoning.jsonl:1", "NaN or Inf"


def task_vector_not_finite(place: Workplace) -> tuple[str, ...]:
    name = "model.layers.0.mlp.up_proj.weight"
    place.change_weights("pretrained", lambda weights: weights[name].fill_(torch.inf))
    return str(place.model("pretrained")), name, "NaN or Inf"


def wrong_shape(place: Workplace) -> tuple[str, ...]:
    name = "model.layers.0.mlp.up_proj.weight"

    def cut(weights: dict[str, torch.Tensor]) -> None:
        weights[name] = weights[name][:-8].clone()

    place.change_weights("instruct", cut)
    return "instruct", name, "is [440, 144], expected [448, 144]"


def missing_tensor(place: Workplace) -> tuple[str, ...]:
    name = "model.layers.0.mlp.up_proj.weight"

    def remove(weights: dict[str, torch.Tensor]) -> None:
        del weights[name]

    place.change_weights("pretrained", remove)
    return (f"pretrained: {name} is missing",)


def many_at_once(place: Workplace) -> tuple[str, ...]:
    """In all three models, in what is merged and what is not, of shapes and of types."""
    up, norm = "model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"
    query = "model.layers.0.self_attn.q_proj.weight"

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[up] = weights[up].mul(100).to(torch.int8)
        weights[norm] = weights[norm][:-8].clone()

    def remove(weights: dict[str, torch.Tensor]) -> None:
        del weights[norm], weights[query]

    place.change_weights("instruct", change)
    place.change_weights("pretrained", change)
    place.change_weights("reasoning", remove)
    both = [
        text
        for role in ("instruct", "pretrained")
        for text in (
            f"{role}: {up} is stored as I8, expected a plain weight",
            f"{role}: {norm} is [136], expected [144]",
        )
    ]
    return "6 problems", *both, f"reasoning: {norm} is missing", f"reasoning: {query} is missing"


def quantised(place: Workplace) -> tuple[str, ...]:
    """Numbers that mean nothing without their scales; one byte each, of the right shape."""
    name = "model.layers.0.mlp.up_proj.weight"

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[name] = weights[name].to(torch.float8_e4m3fn)

    place.change_weights("reasoning", change)
    return (f"reasoning: {name} is stored as F8_E4M3, expected a plain weight", "not quantised")


def another_family(place: Workplace) -> tuple[str, ...]:
    place.change_json("instruct", "config.json", model_type="llama")
    return "'llama' model", "must share one family"


def pickled(place: Workplace) -> tuple[str, ...]:
    model = place.model("instruct")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    return ("only safetensors checkpoints are read",)


def cut_checkpoint(place: Workplace) -> tuple[str, ...]:
    path = place.model("pretrained") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return (str(place.model("pretrained")),)


@pytest.mark.parametrize(
    "change",
    [
        no_chat_template,
        features_not_finite,
        task_vector_not_finite,
        wrong_shape,
        missing_tensor,
        many_at_once,
        quantised,
        another_family,
        pickled,
        cut_checkpoint,
    ],
)
def test_models(place: Workplace, change: Callable[[Workplace], tuple[str, ...]]) -> None:
    expected = change(place)
    message = refused(place.folder, "calibrate", place.yaml)
    for text in expected:
        assert text in message


# File of a model -> how its content is changed, and what the message says.
BROKEN: dict[str, tuple[str, dict[str, Any] | str, str]] = {
    "too many layers": ("config.json", {"num_hidden_layers": 10**12}, "the checkpoint has 14"),
    "no layers": ("config.json", {"num_hidden_layers": 0, "layer_types": []}, "found no list of 0"),
    "no heads": ("config.json", {"num_attention_heads": 0}, "cannot build the architecture"),
    "other type": ("config.json", {"hidden_size": "big"}, "expected int, got str (value: 'big')"),
    "other count": ("config.json", {"layer_types": ["full_attention"] * 3}, "number of `layer_ty"),
    "unknown dtype": ("config.json", {"dtype": "nonsense"}, "no attribute 'nonsense'"),
    "no architecture": ("config.json", {"architectures": None}, "names None as `architectures`"),
    "two architectures": ("config.json", {"architectures": ["A", "B"]}, "expected a list of one"),
    "quantisation": ("config.json", {"quantization_config": "x"}, "cannot read its config"),
    "list": ("config.json", "[]", "cannot read its config"),
    "tokenizer list": ("tokenizer.json", "[]", "cannot load its tokenizer"),
    "tokenizer model": ("tokenizer.json", {"model": {"type": "x"}}, "cannot load its tokenizer"),
    "tokenizer config": ("tokenizer_config.json", "[]", "cannot load its tokenizer"),
    "class": ("tokenizer_config.json", {"tokenizer_class": 3}, "cannot load its tokenizer"),
    "length": ("tokenizer_config.json", {"model_max_length": "x"}, "cannot load its tokenizer"),
    "index list": ("model.safetensors.index.json", "[]", "cannot read the checkpoint"),
    "shards": ("model.safetensors.index.json", '{"weight_map": {"a": 3}}', "something other than"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_of_a_model(place: Workplace, name: str) -> None:
    file, content, words = BROKEN[name]
    if file.endswith("index.json"):
        (place.model("reasoning") / "model.safetensors").unlink()
    if isinstance(content, dict):
        place.change_json("reasoning", file, **content)
    else:
        (place.model("reasoning") / file).write_text(content)
    message = refused(place.folder, "calibrate", place.yaml)
    assert str(place.model("reasoning")) in message or name in ("no layers", "no heads")
    assert words in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_among_the_files_of_a_model(place: Workplace, name: str) -> None:
    """Nobody writes into it: whoever opened it would wait for ever."""
    path = place.model("instruct") / name
    path.unlink()
    os.mkfifo(path)
    message = refused(place.folder, "calibrate", place.yaml)
    assert f"{place.model('instruct')}: cannot read the checkpoint: not a regular file: {name}" in (
        message
    )


# Existing calibration files


def test_swapped_roles_are_not_calibrated_away(place: Workplace, calibrated: Path) -> None:
    shutil.copy(calibrated, place.calibration)
    write(place, {"models": [entry("instruct", "pretrained"), entry("pretrained", "instruct")]})
    message = refused(place.folder, "merge", place.yaml, place.folder / "out")
    assert f"{place.model('instruct')} as pretrained" in message
    assert "correct the roles" in message


def test_calibration_of_a_newer_format_stays(place: Workplace, calibrated: Path) -> None:
    with safe_open(calibrated, framework="pt") as file:
        metadata = {**file.metadata(), "format_version": str(VERSION + 1)}
    save_file(load_file(calibrated), place.calibration, metadata=metadata)
    message = refused(place.folder, "merge", place.yaml, place.folder / "out")
    assert f"format version {VERSION + 1}" in message
    assert "upgrade" in message


@pytest.mark.parametrize("command", ["calibrate", "merge"])
def test_a_file_that_is_no_calibration_is_not_overwritten(place: Workplace, command: str) -> None:
    foreign = place.model("instruct") / "model.safetensors"
    place.write(parameters={"calibration": str(foreign)})
    out = [place.folder / "out"] if command == "merge" else []
    message = refused(place.folder, command, place.yaml, *out)
    assert f"{foreign} exists and is not a calibration file" in message


# Places to write


def test_calibration_cannot_be_written(place: Workplace) -> None:
    for path in (place.yaml / "x.safetensors", place.folder):
        place.write(parameters={"calibration": str(path)})
        message = refused(place.folder, "calibrate", place.yaml)
        assert str(path) in message or str(path.parent) in message


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def identity(path: Path) -> tuple[int, ...]:
    """Which file that is; following a link changes its time of access."""
    found = path.lstat()
    return found.st_ino, found.st_mode, found.st_mtime_ns


@pytest.mark.parametrize("kind", [pipe, link_to_a_pipe, link_to_itself])
@pytest.mark.parametrize("command", ["calibrate", "merge", "report", "convert-alpha"])
def test_what_is_no_file_is_not_replaced(
    place: Workplace, calibrated: Path, command: str, kind: Callable[[Path], None]
) -> None:
    """It may be /dev/null, which the user root could replace for the whole machine."""
    goal = place.calibration
    kind(goal)
    before = identity(goal)
    alpha = place.folder / "alpha.json"
    alpha.write_text(json.dumps({"axes_info": {"flat_index": [[0, 0, "QK"]]}, "alpha": [1.0]}))
    arguments: dict[str, list[object]] = {
        "calibrate": [place.yaml],
        "merge": [place.yaml, place.folder / "out"],
        "report": [calibrated, "-o", goal],
        "convert-alpha": [alpha, calibrated, "-o", goal],
    }
    message = refused(place.folder, command, *arguments[command])
    assert str(goal) in message
    assert "it is not a regular file" in message
    assert identity(goal) == before


def test_link_that_leads_nowhere(place: Workplace) -> None:
    """Said before a layer is computed, not when the file is to be written."""
    place.calibration.symlink_to(place.folder / "gone" / "file.safetensors")
    message = refused(place.folder, "calibrate", place.yaml)
    assert f"{place.folder / 'gone'}: cannot write the calibration file there" in message


@pytest.mark.parametrize("name", ["x" * 300, "x\0y"])
def test_name_that_no_file_can_have(place: Workplace, name: str) -> None:
    place.write(parameters={"calibration": str(place.folder / name)})
    for command, *out in (("calibrate",), ("merge", place.folder / "out")):
        message = refused(place.folder, command, place.yaml, *out)
        assert "cannot" in message
        assert repr(str(place.folder))[1:-1] in message


@pytest.mark.parametrize("below", ["config.yml", "config.yml/deeper/out", "reasoning"])
def test_output_cannot_be_written(place: Workplace, below: str) -> None:
    message = refused(place.folder, "merge", place.yaml, place.folder / below)
    assert str(place.folder / below) in message
    assert "name another output folder" in message


def test_output_that_no_folder_can_be(place: Workplace) -> None:
    loop = place.folder / "loop"
    loop.symlink_to(loop)
    for out in (loop, loop / "below", place.folder / ("x" * 300)):
        message = refused(place.folder, "merge", place.yaml, out)
        assert str(out) in message
        assert "name another output folder" in message


def test_failed_merge_leaves_an_older_result_alone(place: Workplace, calibrated: Path) -> None:
    shutil.copy(calibrated, place.calibration)
    out = place.folder / "out"
    succeed("merge", place.yaml, out)
    before = (out / "model.safetensors").read_bytes()
    place.write(parameters={"lambda": 1e40})
    assert "holds NaN or infinite values" in refused(place.folder, "merge", place.yaml, out)
    assert (out / "model.safetensors").read_bytes() == before


def test_a_result_that_out_dtype_makes_infinite(place: Workplace, calibrated: Path) -> None:
    """mergekit converts it when the merge method has looked at it."""
    shutil.copy(calibrated, place.calibration)
    out = place.folder / "out"
    place.write(dtype="float32", out_dtype="float16", parameters={"lambda": 1e8})
    message = refused(place.folder, "merge", place.yaml, out)
    assert "holds NaN or infinite values in the result in float16" in message
    place.write(dtype="float32", out_dtype="float16")
    succeed("merge", place.yaml, out)


def test_error_inside_mergekit_is_one_line(place: Workplace, calibrated: Path) -> None:
    shutil.copy(calibrated, place.calibration)
    place.write(tokenizer={"source": "base", "tokens": {"<new>": {"source": "no/such"}}})
    message = refused(place.folder, "merge", place.yaml, place.folder / "out")
    assert "mergekit could not merge" in message
    assert "no/such" in message


def fail_inside(folder: Path) -> None:
    with staged_folder(folder) as stage:
        (stage / "config.json").write_text("new")
        raise RuntimeError


def test_staged_folder_leaves_nothing_after_a_failure(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("old")
    for name in ("old", "new/deep"):
        with pytest.raises(RuntimeError):
            fail_inside(tmp_path / name)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["config.json", "old"]
    assert (tmp_path / "old" / "config.json").read_text() == "old"


def test_staged_folder_replaces_folders_and_weights_of_before(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / "extra").mkdir(parents=True)
    for name in ("model-00001-of-00002.safetensors", "extra/old.txt", "my.txt"):
        (target / name).write_text("old")
    (target / "model.safetensors.index.json").write_text(json.dumps({}))
    with staged_folder(target) as stage:
        assert stage.name == "out"
        (stage / "extra").mkdir()
        (stage / "model.safetensors").write_text("new")
    found = sorted(str(p.relative_to(target)) for p in target.rglob("*"))
    assert found == ["extra", "model.safetensors", "my.txt"]
