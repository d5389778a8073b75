"""The YAML that drives both steps."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hangs import HANGS
from hypothesis import given
from hypothesis import strategies as st

from rain_mergekit.config.merge_config import RainConfig, read_config, read_recipe
from rain_mergekit.errors import RainError


def content(**changes: Any) -> dict[str, Any]:
    base = {
        "merge_method": "rain",
        "base_model": "org/reasoning",
        "models": [
            {"model": "org/instruct", "parameters": {"role": "instruct"}},
            {"model": "org/pretrained", "parameters": {"role": "pretrained"}},
        ],
        "parameters": {"calibration": "./c.rain.safetensors", "lambda": 1.0},
        "dtype": "bfloat16",
        "rain": {"reasoning_data": "r.jsonl", "instruction_data": "i.jsonl", "fit": "projection"},
    }
    base.update(changes)
    return {key: value for key, value in base.items() if value is not None}


Read = Callable[..., RainConfig]


@pytest.fixture(name="read")
def _read(tmp_path: Path) -> Read:
    def read(**changes: Any) -> RainConfig:
        path = tmp_path / "c.yml"
        path.write_text(yaml.safe_dump(content(**changes)))
        return read_config(path)

    return read


def model(name: str, role: str | None = None) -> dict[str, Any]:
    return {"model": name, **({} if role is None else {"parameters": {"role": role}})}


def test_a_full_configuration(read: Read) -> None:
    config = read()
    assert {role: str(m) for role, m in config.models.items()} == {
        "reasoning": "org/reasoning",
        "instruct": "org/instruct",
        "pretrained": "org/pretrained",
    }
    assert config.calibration == Path("c.rain.safetensors")
    assert config.settings.reasoning_data == "r.jsonl"


def test_references_with_revision_and_adapter_are_mergekits_own(read: Read) -> None:
    models = [model("org/i@v1+org/lora@v2", "instruct"), model("org/p", "pretrained")]
    config = read(models=models)
    assert config.instruct.model.revision == "v1"
    assert config.instruct.lora is not None
    assert config.instruct.lora.path == "org/lora"


def test_the_order_of_the_models_and_a_listed_base_do_not_matter(read: Read) -> None:
    models = [
        model("org/reasoning"),
        model("org/pretrained", "pretrained"),
        model("org/instruct", "instruct"),
    ]
    assert read(models=models).models == read().models


def test_the_reasoning_model_may_stand_for_the_pretrained_one(read: Read) -> None:
    models = [model("org/instruct", "instruct"), model("org/reasoning", "pretrained")]
    assert str(read(models=models).pretrained) == "org/reasoning"


ITM, PRE = model("org/instruct", "instruct"), model("org/pretrained", "pretrained")
SLICED = [
    {
        "sources": [
            {"model": "org/instruct", "parameters": {"role": "instruct"}, "layer_range": layers},
            {
                "model": "org/pretrained",
                "parameters": {"role": "pretrained"},
                "layer_range": layers,
            },
            {"model": "org/reasoning", "layer_range": layers},
        ]
    }
    for layers in ([0, 1], [1, 3])
]
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"merge_method": "linear"}, "merge_method is 'linear', expected 'rain'"),
    ({"merge_method": None}, "merge_method"),
    ({"base_model": None}, "base_model is missing"),
    ({"base_model": 5}, "base_model"),
    ({"models": None}, "models"),
    ({"models": []}, "models"),
    ({"models": "org/a"}, "models"),
    ({"models": [ITM]}, "expected exactly two besides base_model .* found 1"),
    ({"models": [ITM, PRE, model("org/x", "instruct")]}, "expected exactly two .* found 3"),
    (
        {"models": [ITM, PRE, ITM], "rain": {"reasoning_data": "r", "instruction_data": "i"}},
        "expected the instruct model, and the pretrained one if .* besides base_model; found 3",
    ),
    ({"models": [ITM, model("org/x")]}, "org/x: parameters.role is None, expected 'instruct' or"),
    ({"models": [ITM, model("org/x", "teacher")]}, "role is 'teacher'"),
    ({"models": [ITM, model("org/x", "instruct")]}, "role 'instruct' is given twice .*org/x"),
    ({"parameters": None}, "parameters.calibration is None, expected the path"),
    ({"parameters": {"calibration": ""}}, "parameters.calibration is ''"),
    ({"parameters": {"calibration": 3}}, "parameters.calibration is 3"),
    ({"parameters": {"calibration": ["a", "b"]}}, "parameters.calibration"),
    ({"rain": None}, "`rain:` section is missing"),
    ({"rain": {"reasoning_data": "r"}}, "instruction_data is missing"),
    (
        {
            "models": None,
            "slices": [{"sources": [{"model": "org/a", "layer_range": [0, 2]}]}],
        },
        "slices: 0: base_model is not among its models",
    ),
    (
        {"models": None, "slices": SLICED[1:]},
        r"slices: 0: layer_range \[1, 3\], expected one that begins at 0",
    ),
    (
        {"models": None, "modules": {name: {"slices": SLICED} for name in "ab"}},
        "modules: 2 of them are listed",
    ),
    (
        {"models": None, "slices": [SLICED[0], {"sources": SLICED[1]["sources"][:1]}]},
        "slices: 1: its models or their roles are others",
    ),
    (
        {"models": None, "slices": [{**SLICED[0], "base_model": "org/x"}]},
        "slices: 0: base_model is another one",
    ),
    (
        {"models": None, "slices": [SLICED[0], {**SLICED[1], "parameters": {"lambda": 0.5}}]},
        "lambda is given for layers 1 to 2: give it under the configuration's own",
    ),
    (
        {"models": None, "slices": [{**SLICED[0], "parameters": {"lambda": "x"}}]},
        "lambda must be a finite number, found 'x'",
    ),
]


def test_slices_that_move_no_layer_are_models(read: Read) -> None:
    whole, module = (
        read(models=None, slices=SLICED),
        read(models=None, modules={"default": {"slices": SLICED}}),
    )
    assert whole.models == module.models == read().models
    assert (whole.layers, module.layers, read().layers) == (3, 3, None)
    assert read(models=None, modules={"default": {"models": content()["models"]}}).layers is None


def test_a_result_without_our_section_can_be_read(tmp_path: Path) -> None:
    """mergekit-multi leaves it out; slices may have a strength of their own there."""
    slices = [SLICED[0], {**SLICED[1], "parameters": {"lambda": 0.5}}]
    written = content(rain=None, models=None, modules={"default": {"slices": slices}})
    (tmp_path / "mergekit_config.yml").write_text(yaml.safe_dump(written))
    recipe = read_recipe(tmp_path)
    assert str(recipe.instruct) == "org/instruct"
    assert recipe.strength == {"layers 1 to 2": 0.5, "otherwise": 1.0}
    with pytest.raises(RainError, match="not one number"):
        _ = recipe.one_strength


def test_several_documents_are_named(tmp_path: Path) -> None:
    path = tmp_path / "multi.yml"
    path.write_text(yaml.safe_dump_all([content(), {"merge_method": "linear"}]))
    with pytest.raises(RainError, match="holds several documents, which mergekit-multi merges"):
        read_config(path)


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_each_mistake_has_one_message_naming_the_file(
    read: Read, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RainError, match=message) as caught:
        read(**change)
    assert str(caught.value).startswith(f"{tmp_path / 'c.yml'}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected a mapping"),
        (b"- a\n- b\n", "expected a mapping"),
        (b"a: [1\n", "not valid YAML"),
        (b"a: !!python/object:os.system x\n", "not valid YAML"),
        (b"a: \xff\xfe\n", "cannot read the configuration"),
        (b"a: 2001-99-99\n", "not valid YAML"),
        (b"[" * 1200, "not valid YAML"),
        (b"a: &x [*x, *x]\nmerge_method: rain\n", r"c\.yml"),
        (b"1: 2\n", r"c\.yml"),
    ],
)
def test_what_is_no_configuration_says_so(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "c.yml"
    path.write_bytes(data)
    with pytest.raises(RainError, match=message):
        read_config(path)


def test_a_missing_file_or_a_folder_says_so(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yml", tmp_path):
        with pytest.raises(RainError, match="cannot read the configuration"):
            read_config(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(content())), VALUES, max_size=3))
def test_any_value_in_any_field_gives_a_configuration_or_one_message(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("config") / "c.yml"
    path.write_text(yaml.safe_dump(content(**changes)))
    try:
        read_config(path)
    except RainError as error:
        assert str(error).startswith(str(path))  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize(
    "value",
    ["much", "nan", float("inf"), 10**400, True, [1.0, "x"], [{"filter": "mlp", "value": "x"}]],
)
def test_a_lambda_that_is_no_number_is_told_before_an_hour_of_calibration(
    read: Read, value: Any
) -> None:
    parameters = {"calibration": "c.safetensors", "lambda": value}
    with pytest.raises(RainError, match="parameters: lambda must be a finite number") as caught:
        read(parameters=parameters)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "value", [0, -0.5, "1.0", [0.5, 1.0], [{"filter": "mlp", "value": [0, 1]}, {"value": 0.3}]]
)
def test_lambdas_that_mergekit_takes(read: Read, value: Any) -> None:
    assert read(parameters={"calibration": "c.safetensors", "lambda": value}).calibration


@pytest.mark.parametrize("field", ["dtype", "out_dtype"])
def test_a_type_that_is_none(read: Read, field: str) -> None:
    with pytest.raises(RainError, match=f"{field} is 'bfloat17', expected a type"):
        read(**{field: "bfloat17"})


def test_parameters_that_rain_has_not(read: Read) -> None:
    """mergekit would leave them out without a word."""
    parameters = {"calibration": "c.safetensors", "lamda": 0.5}
    with pytest.raises(RainError, match="parameters: unknown parameter 'lamda'"):
        read(parameters=parameters)
    models = [model("org/instruct", "instruct"), model("org/pretrained", "pretrained")]
    models[0]["parameters"]["lambda"] = 0.5
    with pytest.raises(RainError, match="org/instruct: parameters: unknown parameter 'lambda'"):
        read(models=models)


def test_a_calibration_below_a_folder_with_the_name_of_a_tilde(read: Read) -> None:
    with pytest.raises(RainError, match="write the whole path"):
        read(parameters={"calibration": "~/c.safetensors"})


def test_a_name_that_is_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_text(
        yaml.safe_dump(content()).replace("rain:\n", "rain:\n  window: 1\n  window: 2\n")
    )
    with pytest.raises(RainError, match="'window' is given twice in one place"):
        read_config(path)


def test_reading_a_configuration_first_leaves_the_method_registered() -> None:
    """mergekit may be imported from here: what registers the method must not be half imported."""
    code = (
        "import rain_mergekit.config.merge_config\n"
        "from mergekit.merge_methods import registry\n"
        "print('rain' in {method.spec.name for method in registry.registered_methods()})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=HANGS
    )
    assert done.stdout == "True\n", done.stderr
