"""`merge_method: rain` is known to mergekit after an installation, and after nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import environments
import pytest
import torch
from environments import ROOT, Environment
from safetensors.torch import save_file

GET_RAIN = "from mergekit import merge_methods; print(merge_methods.get('rain').spec.name)"
NAMES = (
    "from mergekit import merge_methods as m; print(*(x.spec.name for x in m.registered_methods()))"
)
SABOTAGE = "raise RuntimeError('sabotaged')\n"


@pytest.fixture
def fresh(tmp_path: Path, dependencies: Path) -> Environment:
    return environments.create(tmp_path / "venv", dependencies)


@pytest.fixture(scope="module")
def bare_config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A merge with rain whose one fault is that it names no calibration."""
    folder = tmp_path_factory.mktemp("merge")
    for name in ("reasoning", "instruct", "pretrained"):
        model = folder / name
        model.mkdir()
        shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
        kind = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
        (model / "config.json").write_text(json.dumps({**kind, **shape}), encoding="utf-8")
        save_file({"model.norm.weight": torch.ones(8)}, model / "model.safetensors")
    config = {
        "merge_method": "rain",
        "base_model": str(folder / "reasoning"),
        "models": [
            {"model": str(folder / role), "parameters": {"role": role}}
            for role in ("instruct", "pretrained")
        ],
        "dtype": "float32",
    }
    path = folder / "config.yml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return str(path)


def test_mergekit_yaml_knows_the_method_from_a_wheel(
    installed: Environment, bare_config: str
) -> None:
    command = installed.add_command("mergekit-yaml")
    done = installed.run(command, bare_config, str(installed.path / "merged"))
    assert done.returncode != 0
    assert "calibration" in done.stderr
    assert "Unimplemented merge method" not in done.stderr


# One process for both, because importing either takes as long as the rest of its test.
MULTI_THEN_YAML = f"""
import mergekit.scripts.multimerge, runpy
{GET_RAIN}
runpy.run_module("mergekit.scripts.run_yaml", run_name="__main__", alter_sys=True)  # python -m
"""


def test_mergekit_multi_and_run_yaml_as_a_module_know_it_from_an_editable_install(
    fresh: Environment, bare_config: str
) -> None:
    fresh.install("pip", "-e", str(ROOT))
    merged = str(fresh.path / "merged")
    done = fresh.run(fresh.python, "-c", MULTI_THEN_YAML, bare_config, merged)
    assert done.stdout.split()[:1] == ["rain"]
    assert done.returncode != 0
    assert "calibration" in done.stderr
    assert "Unimplemented merge method" not in done.stderr


def test_a_script_knows_it_from_an_editable_install_by_uv(fresh: Environment) -> None:
    fresh.install("uv", "-e", str(ROOT))
    assert fresh.check(f"import mergekit; {GET_RAIN}") == "rain"


def test_a_script_knows_it_from_a_wheel_installed_by_uv_and_no_more_after_uninstalling(
    fresh: Environment, wheel: Path
) -> None:
    before = sorted(fresh.packages.iterdir())
    fresh.install("uv", str(wheel))
    assert fresh.check(f"import mergekit; {GET_RAIN}") == "rain"
    fresh.uninstall()
    assert sorted(fresh.packages.iterdir()) == before
    assert not (fresh.path / "bin" / "mergekit-rain").exists()
    names = fresh.check(NAMES).split()
    assert "linear" in names
    assert "rain" not in names


LIFE_CYCLE = """
import sys, torch
from importlib import machinery, reload
from rain_mergekit import _autoload

def watchers():
    return [f for f in sys.meta_path if type(f).__module__.startswith("rain_mergekit")]

assert len(watchers()) == 1
_autoload.install()
reload(_autoload).install()
assert len(watchers()) == 1, "one watcher, however often it is installed"
loaded = {m for m in sys.modules if m.startswith(("rain_mergekit", "mergekit"))}
assert loaded == {"rain_mergekit", "rain_mergekit._autoload"}, loaded

from mergekit import merge_methods
from mergekit.merge_methods import registry
method = merge_methods.get("rain")
assert not watchers(), "gone after use"
assert type(registry.__spec__.loader) is type(registry.__loader__) is machinery.SourceFileLoader
_autoload.install()
assert merge_methods.get("rain") is method and not watchers(), "idempotent"

reload(registry)
assert "rain" not in {m.spec.name for m in registry.registered_methods()}
_autoload.install()
assert registry.get("rain").spec.name == "rain", "a reloaded registry can be filled again"
"""


def test_the_watcher_comes_once_and_leaves_no_trace(installed: Environment) -> None:
    installed.check(LIFE_CYCLE)


NEIGHBOURS = """
import copy, sys, torch, mergekit
from rain_mergekit import _autoload

class Recorder:
    def __init__(self):
        self.seen = []
    def find_spec(self, name, path=None, target=None):
        self.seen.append(name)

before, behind = Recorder(), Recorder()
sys.meta_path[:] = [before, sys.meta_path[0], behind, *sys.meta_path[1:]]

package = [mergekit.__path__[0] + "/merge_methods"]
spec = sys.meta_path[1].find_spec(_autoload.REGISTRY, package)
assert spec.name == _autoload.REGISTRY and spec.origin.endswith("registry.py")
assert "def register" in spec.loader.get_source(spec.name), "the loader answers as the real one"
assert not copy.copy(spec.loader).is_package(spec.name)
assert "rain_mergekit.merge_method.method" not in sys.modules, "finding is not importing"

behind.seen.clear()
from mergekit import merge_methods
assert before.seen.count(_autoload.REGISTRY) == behind.seen.count(_autoload.REGISTRY) == 1
assert before in sys.meta_path and behind in sys.meta_path
print(merge_methods.get("rain").spec.name)
"""


def test_other_finders_are_asked_as_ever_and_finding_does_not_register(
    installed: Environment,
) -> None:
    assert installed.check(NEIGHBOURS) == "rain"


def test_the_method_module_may_be_imported_first(installed: Environment) -> None:
    assert installed.check(f"import rain_mergekit.merge_method.method; {GET_RAIN}") == "rain"


ALREADY_IMPORTED = f"""
{NAMES}
from rain_mergekit import _autoload
_autoload.install()
{NAMES}
"""


@pytest.mark.parametrize(
    ("switch", "later"),
    [("RAIN_MERGEKIT_AUTOLOAD", False), ("TORCH_DEVICE_BACKEND_AUTOLOAD", True)],
)
def test_each_switch_turns_it_off(installed: Environment, switch: str, later: bool) -> None:
    """With torch's switch a call of install, too late for the watcher, registers at once."""
    first, second = installed.check(ALREADY_IMPORTED, **{switch: "0"}).splitlines()
    assert "rain" not in first.split()
    assert ("rain" in second.split()) is later


def test_a_broken_method_breaks_nothing_else(fresh: Environment, wheel: Path) -> None:
    fresh.install("pip", str(wheel))
    method = fresh.packages / "rain_mergekit" / "merge_method" / "method.py"
    method.write_text(SABOTAGE, encoding="utf-8")
    done = fresh.run(fresh.python, "-c", NAMES)
    assert done.returncode == 0, done.stderr
    assert "linear" in done.stdout.split()
    assert "rain" not in done.stdout.split()
    (warning,) = done.stderr.splitlines()
    assert "merge_method: rain is not available" in warning
    assert "RuntimeError: sabotaged" in warning


def test_a_failing_installation_of_the_watcher_is_only_logged(installed: Environment) -> None:
    script = (
        "import sys; from rain_mergekit._autoload import install;"
        "sys.meta_path = tuple(sys.meta_path); install()"
    )
    done = installed.run(installed.python, "-c", script)
    assert done.returncode == 0, done.stderr
    assert "AttributeError" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_process_without_torch_pays_nothing(installed: Environment) -> None:
    script = "import sys; print(*(m for m in sys.modules if 'rain_mergekit' in m), *sys.meta_path)"
    assert "rain_mergekit" not in installed.check(script)
    assert [p.name for p in installed.packages.glob("*.pth")] == ["dependencies.pth"]


def test_importing_the_package_and_the_hook_is_cheap(installed: Environment) -> None:
    script = (
        "import sys, time; start = time.process_time();"
        "import rain_mergekit; first = time.process_time();"
        "import logging, importlib, typing; middle = time.process_time();"  # torch has them
        "import rain_mergekit._autoload; end = time.process_time();"
        "print(first - start, end - middle, 'torch' in sys.modules or 'mergekit' in sys.modules)"
    )
    runs = [installed.check(script).split() for _ in range(5)]
    assert {heavy for _, _, heavy in runs} == {"False"}
    # Measured: 0.3 ms and 0.6 ms. The processor's time, and the least of several: how long it waits
    # for a machine that does other things as well says nothing.
    assert min(float(package) for package, _, _ in runs) < 0.02
    assert min(float(hook) for _, hook, _ in runs) < 0.02


def test_the_entry_points_are_declared(installed: Environment) -> None:
    script = (
        "from importlib.metadata import distribution as d;"
        "print(*(f'{e.group}:{e.name}={e.value}' for e in d('rain-mergekit').entry_points))"
    )
    assert set(installed.check(script).split()) == {
        "console_scripts:mergekit-rain=rain_mergekit.cli:main",
        "torch.backends:rain_mergekit=rain_mergekit._autoload:install",
        "mergekit.merge_methods:rain=rain_mergekit.merge_method.method:RainMerge",
    }
