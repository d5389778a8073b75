"""`merge_method: rain` through mergekit's own command, on real tiny models."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit import merge_methods
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from merging import (
    LAYERS,
    Calibration,
    Trio,
    add_site,
    check_merge,
    config,
    make_calibration,
    make_model,
    merge,
    merge_process,
)
from safetensors.torch import load_file, save_file

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.schema import VERSION
from rain_mergekit.errors import RainError
from rain_mergekit.linalg.factors import Factors
from rain_mergekit.linalg.merged_weight import BLOCK_ELEMENTS, MIN_BLOCK_ROWS, merged_weight
from rain_mergekit.merge_method.merge_errors import RainMergeError
from rain_mergekit.merge_method.method import RainMerge, register

Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    torch.manual_seed(1)
    return Trio.make(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="module")
def calibration(trio: Trio) -> Calibration:
    torch.manual_seed(2)
    return make_calibration(trio)


@pytest.fixture(scope="module")
def file(calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibration.write(tmp_path_factory.mktemp("file") / "trio.rain.safetensors")


def test_merge_in_its_own_process_equals_dense_computation(
    trio: Trio, calibration: Calibration, file: Path, tmp_path: Path
) -> None:
    done = merge_process(tmp_path, config(trio, file, parameters={"lambda": 0.7}))
    check_merge(done.weights(), trio, calibration, 0.7)
    assert (done.folder / "tokenizer.json").exists()
    assert (done.folder / "mergekit_config.yml").exists()


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_of_each_architecture_and_type(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    trio = Trio.make(tmp_path / "models", kind, dtype)
    calibration = make_calibration(trio)
    path = calibration.write(tmp_path / "c.safetensors")
    done = merge(tmp_path / "run", config(trio, path))
    check_merge(done.weights(), trio, calibration, 1.0)


def test_merged_weights_keep_what_the_reasoning_model_computes_on_protected_features(
    trio: Trio, calibration: Calibration, file: Path, tmp_path: Path
) -> None:
    found = merge(tmp_path, config(trio, file, parameters={"lambda": 3.0})).weights()
    base = trio.weights("reasoning")
    for name in (Q0, "model.layers.1.self_attn.o_proj.weight"):  # oblique; scaled columns
        u = calibration.tensors[f"{calibration.header['tensors'][name]['site']}.u"]
        change = (found[name].double() - base[name].double()) @ u
        assert change.abs().max() < 5e-6


def test_lambda_zero_is_the_reasoning_model_bit_for_bit(
    trio: Trio, file: Path, tmp_path: Path
) -> None:
    found = merge(tmp_path, config(trio, file, parameters={"lambda": 0})).weights()
    for name, tensor in trio.weights("reasoning").items():
        assert torch.equal(found[name], tensor), name


def test_lambda_zero_looks_at_nothing_else(trio: Trio, file: Path) -> None:
    base, tuned, origin = all_weights(trio, Q0)
    base[0, 0] = -0.0
    found = direct(file, Q0, [base, tuned * float("nan"), origin], **{"lambda": 0.0})
    assert torch.equal(found.view(torch.int32), base.view(torch.int32))


def test_without_projection_and_scales_it_is_task_arithmetic(trio: Trio, tmp_path: Path) -> None:
    calibration = make_calibration(trio, project=False, scale=False)
    path = calibration.write(tmp_path / "plain.safetensors")
    found = merge(tmp_path / "rain", config(trio, path)).weights()
    models = [
        {"model": str(trio.instruct), "parameters": {"weight": 1.0}},
        {"model": str(trio.pretrained), "parameters": {"weight": -1.0}},
    ]
    task = config(trio, None, merge_method="task_arithmetic", models=models)
    # R + (I - R) - (B - R) is R + I - B; mergekit's own code computes it
    wanted = merge(tmp_path / "task", task).weights()
    for name in calibration.header["tensors"]:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-6)


def test_lambda_gradient_runs_over_the_layers(
    trio: Trio, calibration: Calibration, file: Path, tmp_path: Path
) -> None:
    found = merge(tmp_path, config(trio, file, parameters={"lambda": [0.0, 1.0]})).weights()
    base = trio.weights("reasoning")
    for name in calibration.header["tensors"]:
        if ".layers.0." in name:
            assert torch.equal(found[name], base[name])
        else:
            wanted = calibration.expected(trio, name, 1.0)
            torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-5)


def test_lambda_filters_choose_tensors(
    trio: Trio, calibration: Calibration, file: Path, tmp_path: Path
) -> None:
    strength = [{"filter": "mlp", "value": 0.25}, {"value": "1.5"}]
    found = merge(tmp_path, config(trio, file, parameters={"lambda": strength})).weights()
    for name in calibration.header["tensors"]:
        wanted = calibration.expected(trio, name, 0.25 if "mlp" in name else 1.5)
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-5)


def test_dtype_of_the_yaml_is_used(
    trio: Trio, calibration: Calibration, file: Path, tmp_path: Path
) -> None:
    found = merge(tmp_path, config(trio, file, dtype="bfloat16")).weights()
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    wanted = calibration.expected(trio, Q0, 1.0)
    torch.testing.assert_close(found[Q0].double(), wanted, rtol=2**-5, atol=2**-5)


def test_sharded_output_and_other_options_of_mergekit(
    trio: Trio, calibration: Calibration, file: Path, tmp_path: Path
) -> None:
    options = ("--out-shard-size", "20000", "--async-write", "--lazy-unpickle")
    done = merge(tmp_path, config(trio, file), *options)
    assert done.code == 0, done.output
    shards = sorted(done.folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    found = {name: t for shard in shards for name, t in load_file(shard).items()}
    check_merge(found, trio, calibration, 1.0)


# Roles


def test_roles_are_inferred_from_the_recorded_references(
    trio: Trio, calibration: Calibration, file: Path, tmp_path: Path
) -> None:
    models = [{"model": str(trio.pretrained)}, {"model": str(trio.instruct)}]
    found = merge(tmp_path, config(trio, file, models=models)).weights()
    check_merge(found, trio, calibration, 1.0)


def test_one_role_settles_the_other_when_the_calibration_knows_neither(
    trio: Trio, calibration: Calibration, tmp_path: Path
) -> None:
    renamed = Calibration(json.loads(json.dumps(calibration.header)), calibration.tensors)
    for role in ("instruct", "pretrained"):
        renamed.header["models"][role]["reference"] = f"some/{role}"
    path = renamed.write(tmp_path / "c.safetensors")
    models = [
        {"model": str(trio.pretrained)},
        {"model": str(trio.instruct), "parameters": {"role": "instruct"}},
    ]
    found = merge(tmp_path / "run", config(trio, path, models=models)).weights()
    check_merge(found, trio, calibration, 1.0)
    models = [{"model": str(trio.pretrained)}, {"model": str(trio.instruct)}]
    message = merge(tmp_path / "none", config(trio, path, models=models)).error()
    assert "no role" in message
    assert "role: pretrained" in message
    assert "some/instruct" in message


def roles(trio: Trio, first: str | None, second: str | None) -> list[dict[str, Any]]:
    return [
        {"model": str(model), "parameters": {"role": role} if role else {}}
        for model, role in ((trio.instruct, first), (trio.pretrained, second))
    ]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("pretrained", "instruct", ["swapped", "instruct ="]),
        ("instruct", "instruct", ["swapped"]),
        ("tuned", "pretrained", ["role must be instruct or pretrained", "tuned"]),
    ],
)
def test_wrong_roles(
    trio: Trio, file: Path, tmp_path: Path, first: str, second: str, words: list[str]
) -> None:
    message = merge(tmp_path, config(trio, file, models=roles(trio, first, second))).error()
    assert all(word in message for word in words), message


def test_the_same_role_twice(trio: Trio, calibration: Calibration, tmp_path: Path) -> None:
    renamed = Calibration(json.loads(json.dumps(calibration.header)), calibration.tensors)
    for role in ("instruct", "pretrained"):
        renamed.header["models"][role]["reference"] = f"some/{role}"
    path = renamed.write(tmp_path / "c.safetensors")
    content = config(trio, path, models=roles(trio, "instruct", "instruct"))
    assert "same role instruct" in merge(tmp_path / "run", content).error()


# Bad input: one message, nothing written


def with_models(trio: Trio, count: int) -> list[dict[str, Any]]:
    models = roles(trio, "instruct", "pretrained")
    extra = make_model(trio.reasoning.parent / "extra", "qwen2", torch.float32)
    return [*models, {"model": str(extra), "parameters": {"role": "instruct"}}][:count]


@pytest.mark.parametrize("count", [1, 3])
def test_not_two_other_models(trio: Trio, file: Path, tmp_path: Path, count: int) -> None:
    message = merge(tmp_path, config(trio, file, models=with_models(trio, count))).error()
    assert "exactly two models" in message
    assert f"found {count}" in message


def test_model_given_twice(trio: Trio, file: Path, tmp_path: Path) -> None:
    models = roles(trio, "instruct", "pretrained")
    models[1]["model"] = models[0]["model"]
    message = merge(tmp_path, config(trio, file, models=models)).error()
    assert "given more than once" in message


def test_no_base_model(trio: Trio, file: Path, tmp_path: Path) -> None:
    message = merge(tmp_path, config(trio, file, base_model=None)).error()
    assert "needs `base_model`" in message


@pytest.mark.parametrize("value", [None, 3, "", ["a", "b"]])
def test_no_calibration(trio: Trio, tmp_path: Path, value: object) -> None:
    parameters = {} if value is None else {"calibration": value}
    message = merge(tmp_path, config(trio, None, parameters=parameters)).error()
    assert "calibration" in message


def test_missing_calibration_in_its_own_process(trio: Trio, tmp_path: Path) -> None:
    done = merge_process(tmp_path, config(trio, tmp_path / "nowhere.safetensors"))
    message = done.error()
    assert "does not exist" in message
    assert "mergekit-rain calibrate" in message


@pytest.mark.parametrize("strength", ["much", float("nan"), float("inf")])
def test_lambda_that_is_no_number(trio: Trio, file: Path, tmp_path: Path, strength: object) -> None:
    message = merge(tmp_path, config(trio, file, parameters={"lambda": strength})).error()
    assert "lambda must be a finite number" in message


def test_calibration_of_another_model(trio: Trio, file: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", "qwen2", torch.float32)
    message = merge(tmp_path / "run", config(trio, file, base_model=str(other))).error()
    assert "another reasoning model" in message
    assert str(trio.reasoning) in message
    assert "weights" in message


def test_another_model_of_another_size_is_told_all_at_once(
    trio: Trio, file: Path, tmp_path: Path
) -> None:
    wide = make_model(tmp_path / "wide", "qwen2", torch.float32, width=64)
    message = merge(tmp_path / "run", config(trio, file, base_model=str(wide))).error()
    assert f"base_model {wide} differs in config, index, weights" in message
    assert f"reasoning model {wide}: {Q0} has shape [64, 64]" in message


def test_reasoning_and_instruct_model_swapped(trio: Trio, file: Path, tmp_path: Path) -> None:
    models = [
        {"model": str(trio.reasoning), "parameters": {"role": "instruct"}},
        {"model": str(trio.pretrained), "parameters": {"role": "pretrained"}},
    ]
    content = config(trio, file, base_model=str(trio.instruct), models=models)
    assert "it is the instruct model" in merge(tmp_path, content).error()


def truncated(data: bytes) -> bytes:
    return data[:-5]


def altered(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


def newer(data: bytes) -> bytes:
    return data.replace(b'"format_version":"1"', b'"format_version":"%d"' % (VERSION + 1))


def tampered(data: bytes) -> bytes:
    return data.replace(b'\\"rank\\": 5', b'\\"rank\\": 4', 1)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "truncated"),
        (altered, "was altered"),
        (newer, "newer rain_mergekit"),
        (tampered, "header was altered"),
        (lambda data: data[:100], "cut off"),
        (lambda _: b"", "not a safetensors file"),
    ],
)
def test_damaged_calibration(
    trio: Trio, file: Path, tmp_path: Path, damage: Callable[[bytes], bytes], words: str
) -> None:
    data = file.read_bytes()
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(damage(data))
    assert broken.read_bytes() != data
    message = merge(tmp_path / "run", config(trio, broken)).error()
    assert words in message
    assert str(broken) in message


def test_all_shapes_that_do_not_fit_are_listed(
    trio: Trio, calibration: Calibration, tmp_path: Path
) -> None:
    wrong = Calibration(json.loads(json.dumps(calibration.header)), dict(calibration.tensors))
    for plan in wrong.header["tensors"].values():
        plan["rows"] = None
        plan["shape"][0] += 1
    path = wrong.write(tmp_path / "c.safetensors")
    message = merge(tmp_path / "run", config(trio, path)).error()
    assert "[32, 32], the calibration expects [33, 32]" in message
    assert "and 22 more" in message  # 14 tensors, three models, 20 shown


def test_instruct_model_of_another_size(trio: Trio, file: Path, tmp_path: Path) -> None:
    wide = make_model(tmp_path / "wide", "qwen2", torch.float32, width=64)
    models = roles(trio, "instruct", "pretrained")
    models[0]["model"] = str(wide)
    message = merge(tmp_path / "run", config(trio, file, models=models)).error()
    assert f"instruct model {wide}: {Q0} has shape [64, 64]" in message


def test_everything_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    """In all three models, also of tensors that the merge only compares and copies."""
    trio = Trio.make(tmp_path / "models")
    file = make_calibration(trio).write(tmp_path / "c.safetensors")
    norm = "model.layers.1.input_layernorm.weight"

    def edit(role: str, **changed: Callable[[torch.Tensor], torch.Tensor]) -> None:
        path = tmp_path / "models" / role / "model.safetensors"
        weights = load_file(path)
        names = {"query": Q0, "norm": norm}
        edited = {names[key]: change(weights[names[key]]) for key, change in changed.items()}
        save_file({**weights, **edited}, path, metadata={"format": "pt"})

    edit("instruct", norm=lambda t: t[:-4].clone(), query=lambda t: t.to(torch.int8))
    edit("pretrained", norm=lambda t: t[:-4].clone(), query=lambda t: t.to(torch.float8_e4m3fn))
    edit("reasoning", query=lambda t: t[:-1].clone())
    message = merge(tmp_path / "run", config(trio, file)).error()
    for words in (
        "differs in index",
        f"reasoning model {trio.reasoning}: {Q0} has shape [31, 32]",
        f"instruct model {trio.instruct}: {Q0} is stored as I8, expected a plain weight",
        f"instruct model {trio.instruct}: {norm} has shape [28], the reasoning model's is [32]",
        f"pretrained model {trio.pretrained}: {Q0} is stored as F8_E4M3",
        f"pretrained model {trio.pretrained}: {norm} has shape [28]",
    ):
        assert words in message


@pytest.mark.parametrize("role", ["reasoning", "instruct", "pretrained"])
def test_not_a_number_in_a_model(tmp_path: Path, role: str) -> None:
    trio = Trio.make(tmp_path / "models")
    weights = trio.weights(role)
    weights[Q0][0, 4] = float("nan")  # in the row that is compared with the checkpoint's, too
    save_file(weights, getattr(trio, role) / "model.safetensors", metadata={"format": "pt"})
    path = make_calibration(trio).write(tmp_path / "c.safetensors")
    message = merge(tmp_path / "run", config(trio, path)).error()
    assert Q0 in message
    assert f"{role} model {getattr(trio, role)}" in message


NORM = "model.norm.weight"  # which no calibration lists


def poisoned(folder: Path, role: str) -> dict[str, Any]:
    """A merge in which that model's norm, which no projection changes, holds an infinite value."""
    trio = Trio.make(folder / "models")
    weights = trio.weights(role)
    weights[NORM][-1] = float("inf")
    save_file(weights, getattr(trio, role) / "model.safetensors", metadata={"format": "pt"})
    return config(trio, make_calibration(trio).write(folder / "c.safetensors"))


def test_not_a_number_in_what_the_merge_copies(tmp_path: Path) -> None:
    message = merge(tmp_path / "run", poisoned(tmp_path, "reasoning")).error()
    assert f"{NORM} holds NaN or infinite values in the reasoning model" in message


def test_not_a_number_in_what_the_merge_leaves_out_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = poisoned(tmp_path, "instruct")
    assert merge(tmp_path / "run", content).code == 0
    said = f"{NORM} holds NaN or infinite values in {content['models'][0]['model']}"
    assert any(said in text for text in caplog.messages)


@pytest.mark.parametrize("role", ["reasoning", "instruct"])
def test_shard_that_cannot_be_read(trio: Trio, file: Path, tmp_path: Path, role: str) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(getattr(trio, role), folder)
    whole = folder / "model.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(trio.weights(role), "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_bytes(whole.read_bytes()[:500])
    whole.unlink()
    content = config(trio, file)
    if role == "reasoning":
        content["base_model"] = str(folder)
    else:
        content["models"][0]["model"] = str(folder)
    message = merge(tmp_path / "run", content).error()
    assert str(folder / "model-1.safetensors") in message
    assert "cannot read" in message


def test_other_models_may_be_pickled(
    trio: Trio, calibration: Calibration, file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(trio.instruct, folder)
    (folder / "model.safetensors").unlink()
    torch.save(trio.weights("instruct"), folder / "pytorch_model.bin")
    content = config(trio, file)
    content["models"][0]["model"] = str(folder)
    check_merge(merge(tmp_path / "run", content).weights(), trio, calibration, 1.0)


def test_result_that_overflows(tmp_path: Path) -> None:
    trio = Trio.make(tmp_path / "models", dtype=torch.float16)
    path = make_calibration(trio).write(tmp_path / "c.safetensors")
    message = merge(tmp_path / "run", config(trio, path, parameters={"lambda": 1e7})).error()
    assert "the result in torch.float16" in message


def test_a_failed_merge_leaves_an_older_result_alone(
    trio: Trio, file: Path, tmp_path: Path
) -> None:
    done = merge(tmp_path, config(trio, file))
    before = (done.folder / "model.safetensors").read_bytes()
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(altered(file.read_bytes()))
    assert merge(tmp_path, config(trio, broken)).code == 1
    assert (done.folder / "model.safetensors").read_bytes() == before


# Direct use


def direct(calibration: Any, name: str, weights: list[torch.Tensor], **parameters: Any) -> Any:
    return merge_tensors(
        weights,
        "rain",
        parameters={
            "calibration": calibration,
            "role": ["instruct", "pretrained"],
            **parameters,
        },
        base_index=0,
        name=name,
    )


def all_weights(trio: Trio, name: str) -> list[torch.Tensor]:
    return [trio.weights(role)[name] for role in ("reasoning", "instruct", "pretrained")]


def test_merge_tensors_without_a_checkpoint(
    trio: Trio, calibration: Calibration, file: Path
) -> None:
    found = direct(file, Q0, all_weights(trio, Q0))
    wanted = calibration.expected(trio, Q0, 1.0)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    double = direct(str(file), Q0, [weight.double() for weight in all_weights(trio, Q0)])
    torch.testing.assert_close(double, wanted, rtol=1e-6, atol=1e-6)


def test_merge_state_dicts(trio: Trio, calibration: Calibration, file: Path) -> None:
    states = {role: trio.weights(role) for role in ("reasoning", "instruct", "pretrained")}
    found = merge_state_dicts(
        states,
        "rain",
        base="reasoning",
        parameters={
            "calibration": file,
            "role": {"instruct": "instruct", "pretrained": "pretrained"},
        },
    )
    check_merge(found, trio, calibration, 1.0)


def test_roles_of_one_direct_merge_say_nothing_about_the_next(trio: Trio, file: Path) -> None:
    weights = all_weights(trio, Q0)
    found = [
        merge_tensors(
            [weights[0], *(weights[i] for i in order)],
            "rain",
            parameters={
                "calibration": file,
                "role": [("instruct", "pretrained")[i - 1] for i in order],
            },
            ids=["r", *((str(trio.instruct), str(trio.pretrained))[i - 1] for i in order)],
            base_index=0,
            name=Q0,
        )
        for order in ((1, 2), (2, 1))
    ]
    assert torch.equal(*found)


def test_direct_use_without_name_or_with_another_shape(trio: Trio, file: Path) -> None:
    weights = all_weights(trio, Q0)
    with pytest.raises(RainMergeError, match="pass the tensor's name"):
        direct(file, None, weights)  # type: ignore[arg-type]
    with pytest.raises(RainError, match=r"\[16, 32\], the calibration expects \[32, 32\]"):
        direct(file, Q0, [weight[:16] for weight in weights])


def test_listed_tensor_that_one_model_lacks(trio: Trio, file: Path) -> None:
    with pytest.raises(RainMergeError, match="but only 0, 1 has it"):
        merge_tensors(
            all_weights(trio, Q0)[:2],
            "rain",
            parameters={"calibration": file, "role": ["instruct"]},
            base_index=0,
            name=Q0,
        )


def test_unlisted_tensor_that_the_others_lack_is_the_base(file: Path) -> None:
    tensor = torch.randn(4)
    parameters = {"calibration": file}
    found = merge_tensors([tensor], "rain", parameters=parameters, base_index=0, name="x.bias")
    assert torch.equal(found, tensor)
    assert found.data_ptr() != tensor.data_ptr()  # a piece of a mapped shard would keep all of it


def test_a_shared_basis_is_read_once(trio: Trio, file: Path) -> None:
    opened = CalibrationFile.open(file)
    for layer in range(LAYERS):
        for module in ("k_proj", "o_proj", "q_proj", "v_proj"):  # mergekit's order
            name = f"model.layers.{layer}.self_attn.{module}.weight"
            direct(opened, name, all_weights(trio, name))
    bases = {key: count for key, count in opened.reads.items() if key.endswith((".u", ".v"))}
    assert bases == {
        key: 1
        for layer in range(LAYERS)
        for key in (
            f"model.layers.{layer}.attention.u",
            f"model.layers.{layer}.attention.v",
            f"model.layers.{layer}.output.u",
        )
    }


def test_many_threads_equal_one(trio: Trio, calibration: Calibration, file: Path) -> None:
    names = list(calibration.header["tensors"])
    weights = {name: all_weights(trio, name) for name in names}
    serial = {name: direct(file, name, weights[name]) for name in names}
    opened = CalibrationFile.open(file)
    wrong: list[str] = []
    start = threading.Barrier(8)

    def work(offset: int) -> None:
        start.wait()
        for step in range(3 * len(names)):
            name = names[(offset * 5 + step) % len(names)]
            if not torch.equal(direct(opened, name, weights[name]), serial[name]):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    u_reads = [count for key, count in opened.reads.items() if key.endswith(".u")]
    assert u_reads == [1] * 6  # eight sites fit the cache


def test_a_changed_file_is_opened_again(trio: Trio, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    for seed in (1, 2):
        torch.manual_seed(seed)
        calibration = make_calibration(trio)
        fresh = calibration.write(tmp_path / "fresh")
        path.write_bytes(fresh.read_bytes())  # the same inode and size
        wanted = calibration.expected(trio, Q0, 1.0)
        found = direct(path, Q0, all_weights(trio, Q0))
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def small(sites: int, width: int) -> Calibration:
    role = {"reference": "a", "revision": None, "fingerprint": None}
    header: dict[str, Any] = {
        "models": {"reasoning": role, "instruct": role, "pretrained": role},
        "sites": {},
        "tensors": {},
    }
    calibration = Calibration(header)
    for index in range(sites):
        add_site(calibration, f"s{index}", width, 3 if index != 1 else 0, "oblique")
    return calibration


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("shared", [False, True])
def test_experts_with_their_own_bases(tmp_path: Path, axis: int, *, shared: bool) -> None:
    experts, d_in, d_out = 3, 6, 5
    calibration = small(experts, d_in)
    shape = (experts, d_out, d_in) if axis == -1 else (experts, d_in, d_out)
    calibration.tensors["rows"] = torch.rand(d_out).double()
    calibration.tensors["cols"] = torch.rand(d_in).double()
    calibration.header["tensors"]["w"] = {
        "site": "s0" if shared else ["s0", "s1", "s2"],
        "shape": list(shape),
        "input_axis": axis,
        "rows": "rows",
        "cols": "cols",
    }
    path = calibration.write(tmp_path / "c.safetensors")
    base, tuned, origin = (torch.randn(shape).double() for _ in range(3))
    found = direct(path, "w", [base, tuned, origin], **{"lambda": 0.5})
    rows, cols = calibration.tensors["rows"].float(), calibration.tensors["cols"].float()
    for expert in range(experts):
        delta = (tuned - origin)[expert] if axis == -1 else (tuned - origin)[expert].T
        keep = torch.eye(d_in) - calibration.projectors["s0" if shared else f"s{expert}"]
        change = 0.5 * (torch.diag(rows.double()) @ delta @ torch.diag(cols.double())) @ keep
        wanted = base[expert] + (change if axis == -1 else change.T)
        torch.testing.assert_close(found[expert], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("axis", [-1, -2])
def test_row_blocks_do_not_show(axis: int, gamma: float) -> None:
    d_out, d_in = 300, BLOCK_ELEMENTS // MIN_BLOCK_ROWS + 1  # two whole blocks and a piece
    shape = (d_out, d_in) if axis == -1 else (d_in, d_out)
    base, tuned, origin = (torch.randn(shape) for _ in range(3))
    u = torch.linalg.qr(torch.randn(d_in, 2))[0]
    rows, cols = torch.rand(d_out), torch.rand(d_in)
    found = merged_weight((base, tuned, origin), Factors(u, u), (rows, cols), 0.3, axis, gamma)
    first, second, third = (
        w.double() if axis == -1 else w.double().T for w in (base, tuned, origin)
    )
    keep = torch.eye(d_in, dtype=torch.float64) - u.double() @ u.double().T
    delta = (second - third) - gamma * (first - third)
    wanted = first + 0.3 * (rows.double()[:, None] * delta * cols.double()) @ keep
    wanted = wanted if axis == -1 else wanted.T
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous()


def test_a_change_beside_a_projection_leaves_the_task_vector_alone(tmp_path: Path) -> None:
    """W_R + lambda (Delta (I - U V^T) + A B^T): Delta is of the reasoning model, with gamma too."""
    calibration = small(1, 6)
    a, b = torch.randn(5, 2).double(), torch.randn(6, 2).double()
    calibration.tensors |= {"a": a, "b": b}
    calibration.header["gamma"] = 0.5
    calibration.header["tensors"]["w"] = {
        "site": "s0",
        "shape": [5, 6],
        "input_axis": -1,
        "rows": None,
        "cols": None,
        "a": "a",
        "b": "b",
    }
    path = calibration.write(tmp_path / "c.safetensors")
    base, tuned, origin = (torch.randn(5, 6).double() for _ in range(3))
    found = direct(path, "w", [base, tuned, origin], **{"lambda": 0.5})
    delta = (tuned - origin) - 0.5 * (base - origin)
    wanted = base + 0.5 * (delta @ (torch.eye(6) - calibration.projectors["s0"]) + a @ b.T)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_what_is_not_finite_shows_through_scales_of_zero(tmp_path: Path) -> None:
    calibration = small(1, 6)
    calibration.tensors["rows"] = torch.zeros(5).double()
    calibration.header["tensors"]["w"] = {
        "site": "s0",
        "shape": [5, 6],
        "input_axis": -1,
        "rows": "rows",
        "cols": None,
    }
    path = calibration.write(tmp_path / "c.safetensors")
    weights = [torch.randn(5, 6) for _ in range(3)]
    weights[2][1, 2] = float("-inf")
    with pytest.raises(RainMergeError, match="w holds NaN or infinite values in the pretrained"):
        direct(path, "w", weights)


def test_inputs_are_not_changed(trio: Trio, file: Path) -> None:
    weights = all_weights(trio, Q0)
    copies = [weight.clone() for weight in weights]
    direct(file, Q0, [weight.requires_grad_() for weight in weights])
    assert all(torch.equal(a, b) for a, b in zip(weights, copies, strict=True))


def slices(trio: Trio, *firsts: int) -> list[dict[str, Any]]:
    models = (trio.reasoning, trio.instruct, trio.pretrained)
    return [
        {"sources": [{"model": str(m), "layer_range": [first, first + 1]} for m in models]}
        for first in firsts
    ]


def test_slices_of_a_yaml(trio: Trio, calibration: Calibration, file: Path, tmp_path: Path) -> None:
    content = config(trio, file, models=None, slices=slices(trio, 0, 1))
    found = merge(tmp_path, content).weights()
    check_merge(found, trio, calibration, 1.0)


def test_slices_that_move_layers(trio: Trio, file: Path, tmp_path: Path) -> None:
    content = config(trio, file, models=None, slices=slices(trio, 1, 0))
    assert "the slices move layers" in merge(tmp_path, content).error()


def test_registering_again_changes_nothing() -> None:
    register()
    register()
    names = [method.spec.name for method in merge_methods.registered_methods()]
    assert names.count("rain") == 1
    method = merge_methods.get("rain")
    assert isinstance(method, RainMerge)
    assert method.spec.reference_url == "https://arxiv.org/abs/2602.22538"


def test_calibration_without_fingerprint_merges_with_a_warning(
    trio: Trio, calibration: Calibration, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    header = json.loads(json.dumps(calibration.header))
    header["models"]["reasoning"]["fingerprint"] = None
    path = Calibration(header, calibration.tensors).write(tmp_path / "c.safetensors")
    found = merge(tmp_path / "run", config(trio, path)).weights()
    check_merge(found, trio, calibration, 1.0)
    assert [record for record in caplog.records if "no fingerprint" in record.message]


def test_relative_path_is_taken_from_the_working_folder(
    trio: Trio, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    found = direct(file.name, Q0, all_weights(trio, Q0))
    assert torch.equal(found, direct(file, Q0, all_weights(trio, Q0)))
    assert not Path(file.name).is_absolute()


def test_float32_checkpoints_are_rounded_once_with_an_out_dtype(tmp_path: Path) -> None:
    """With `dtype: bfloat16` what mergekit reads is rounded first, and then the result."""
    trio = Trio.make(tmp_path / "models")
    calibration = make_calibration(trio)
    path = calibration.write(tmp_path / "c.safetensors")
    ways = {"once": {"dtype": "float32", "out_dtype": "bfloat16"}, "twice": {"dtype": "bfloat16"}}
    found = {way: merge(tmp_path / way, config(trio, path, **ways[way])).weights() for way in ways}
    for name in calibration.header["tensors"]:
        exact = calibration.expected(trio, name, 1.0)
        least = (exact.bfloat16().double() - exact).norm()
        errors = {way: (found[way][name].double() - exact).norm() for way in ways}
        assert errors["once"] < 1.01 * least, name
        assert errors["twice"] > 1.2 * least, name
