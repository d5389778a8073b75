"""Real processes that die, run out of space, or lose their files; then what is left.

`RAIN_FAULTS=N` kills N runs of each kind instead of a few, at random times and at every change of
the file system.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from forks import NOT_PERMITTED, Ended, Forks, wait_for_stop
from hangs import HANGS
from tiny import Tiny
from watching import untouched

FAULTS = int(os.environ.get("RAIN_FAULTS", "0"))
LAYERS = 4
DAMAGED = 3
ROOM = 4 * 1024**2
OPTIONS = ("--device", "cpu", "--snapshot-every", 0, "--quiet")


@pytest.fixture(scope="module", name="forks")
def _forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    # Memory for anything large comes from the system and goes back to it, so that limits bind.
    forks = Forks(tmp_path_factory.mktemp("forks"), MALLOC_MMAP_THRESHOLD_=str(ROOM // 4))
    yield forks
    forks.close()


@pytest.fixture(scope="module", name="models")
def _models(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """In several shards, as models of real size are."""
    folder = tmp_path_factory.mktemp("models")
    return Tiny.make(folder, "qwen2", num_hidden_layers=LAYERS, shard="150KB")


@pytest.fixture(scope="module", name="wide")
def _wide(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Its layers need several times more memory than `ROOM`, and its calibration much less disk."""
    sizes = {"num_hidden_layers": LAYERS, "intermediate_size": 30_000, "shard": "8MB"}
    tiny = Tiny.make(tmp_path_factory.mktemp("wide"), "qwen2", **sizes)
    tiny = Tiny(tiny.folder, {"rank_by": "count", "rank_count": 2}, "c/tiny.rain.safetensors")
    tiny.path.parent.mkdir()
    tiny.config()
    return tiny


def fresh(models: Tiny, folder: Path) -> Tiny:
    """The same models, linked, and nothing else there."""
    shutil.rmtree(folder)
    for role in ("reasoning", "instruct", "pretrained"):
        shutil.copytree(models.folder / role, folder / role, copy_function=os.link)
    for item in models.folder.glob("*.jsonl"):
        shutil.copyfile(item, folder / item.name)
    tiny = Tiny(folder, {"coefficients": "normalized", "alpha_min": 0.0}, "c/tiny.rain.safetensors")
    tiny.path.parent.mkdir(exist_ok=True)
    tiny.config()
    return tiny


@pytest.fixture(name="place", scope="module")
def _place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all: the calibration file says where the models lie."""
    return tmp_path_factory.mktemp("place")


@pytest.fixture(name="tiny")
def _tiny(models: Tiny, place: Path, whole: bytes, merged: dict[str, str]) -> Tiny:
    assert whole
    assert merged
    return fresh(models, place)


def config(tiny: Tiny) -> Path:
    return tiny.path.with_suffix(".yml")


def calibrate(tiny: Tiny) -> tuple[object, ...]:
    return ("calibrate", config(tiny), *OPTIONS)


def merge(tiny: Tiny) -> tuple[object, ...]:
    return ("merge", config(tiny), tiny.folder / "out", "--quiet", "--out-shard-size", "50K")


@pytest.fixture(scope="module", name="whole")
def _whole(models: Tiny, forks: Forks, place: Path) -> bytes:
    """The calibration file of a run that nothing stopped."""
    tiny = fresh(models, place)
    ended = forks.run(*calibrate(tiny))
    assert ended.code == 0, ended.output
    return tiny.path.read_bytes()


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file, by its path in the folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module", name="merged")
def _merged(models: Tiny, forks: Forks, whole: bytes, place: Path) -> dict[str, str]:
    """The merged model of a run that nothing stopped."""
    tiny = fresh(models, place)
    tiny.path.write_bytes(whole)
    ended = forks.run(*merge(tiny))
    assert ended.code == 0, ended.output
    return model(tiny)


def model(tiny: Tiny) -> dict[str, str]:
    """What a user would load; the copied configuration names the folder, which differs."""
    found = contents(tiny.folder / "out")
    return {name: hexa for name, hexa in found.items() if name.endswith((".safetensors", ".json"))}


def check_calibration(tiny: Tiny, whole: bytes) -> None:
    """Whole or not there; nothing beside it but the folder that says what it is.

    Killed between the two system calls that replace an older one, it leaves a whole one more.
    """
    names = {path.name for path in tiny.path.parent.iterdir()}
    for name in names - {tiny.path.name, f"{tiny.path.name}.work", config(tiny).name}:
        assert name.startswith(f".{tiny.path.name}.")
        assert tiny.path.exists()
        assert (tiny.path.parent / name).read_bytes() == whole
        (tiny.path.parent / name).unlink()
    assert not tiny.path.exists() or tiny.path.read_bytes() == whole


def moments(total: int, few: int, seed: int) -> list[int]:
    """Numbers from 1 to total: a few of them by chance, or as many as the long run asks for."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    every = list(range(1, total + 1))
    return sorted(chance.sample(every, min(total, FAULTS or few)))


def test_calibrate_killed_at_changes_of_the_file_system(
    tiny: Tiny, forks: Forks, whole: bytes
) -> None:
    """Just before a file gets its name or loses it, the calibration file itself included."""
    total = forks.run(*calibrate(tiny)).changes
    assert total > 3 * LAYERS
    for moment in {*moments(total, 3, seed=1), *range(total - 8, total + 1, 2)}:
        tiny.path.unlink(missing_ok=True)
        shutil.rmtree(f"{tiny.path}.work", ignore_errors=True)
        assert forks.run(*calibrate(tiny), die_at=moment).code == -signal.SIGKILL
        check_calibration(tiny, whole)
        ended = forks.run(*calibrate(tiny))
        assert ended.code == 0, ended.output
        assert tiny.path.read_bytes() == whole


@pytest.mark.slow
def test_calibrate_killed_again_and_again(tiny: Tiny, forks: Forks, whole: bytes) -> None:
    """At random times, each run going on from what the killed ones left."""
    chance = random.Random(2)  # noqa: S311 - no secret
    begin = time.monotonic()
    assert forks.run(*calibrate(tiny)).code == 0
    usual = time.monotonic() - begin
    killed = 0
    for _ in range(20 * (FAULTS or 4)):
        pid, patience = forks.start(*calibrate(tiny)), chance.random() * usual
        time.sleep(patience)
        with suppress(ProcessLookupError):  # it was faster
            os.kill(pid, signal.SIGKILL)
        ended = forks.wait()
        assert ended.code in (0, -signal.SIGKILL), ended.output
        killed += ended.code != 0
        check_calibration(tiny, whole)
        if killed == (FAULTS or 4):
            break
        if ended.code == 0:
            usual = patience  # the first run was slower, on a machine that others use too
            tiny.path.unlink()
    assert killed == (FAULTS or 4)
    ended = forks.run(*calibrate(tiny))
    assert ended.code == 0, ended.output
    assert tiny.path.read_bytes() == whole
    assert not Path(f"{tiny.path}.work").exists()


@pytest.mark.slow
@pytest.mark.parametrize("older", [False, True])
def test_merge_killed_at_changes_of_the_file_system(
    tiny: Tiny, forks: Forks, whole: bytes, merged: dict[str, str], *, older: bool
) -> None:
    """Also where the folder holds an older, different model: never shards of both."""
    tiny.path.write_bytes(whole)
    out = tiny.folder / "out"
    total = forks.run(*merge(tiny)).changes
    for moment in {*moments(total, 2, seed=3), total - 4}:
        shutil.rmtree(out)
        if older:
            shutil.copytree(tiny.folder / "instruct", out)
        before = contents(out)
        ended = forks.run(*merge(tiny), die_at=moment)
        assert ended.code == -signal.SIGKILL, ended.output
        if (out / "config.json").exists():  # without it a folder is no model
            found = contents(out)
            wholly = [{name: found.get(name) for name in part} == part for part in (merged, before)]
            assert wholly[0] or (older and wholly[1])
        ended = forks.run(*merge(tiny))
        assert ended.code == 0, ended.output
        assert model(tiny) == merged
        assert not list(out.glob(".rain-*"))


def limited(forks: Forks, tiny: Tiny, what: tuple[object, ...], **limits: int) -> str:
    """The run fails with one clear message, and leaves nothing that could be taken for a result."""
    ended = forks.run(*what, limits=limits)
    return failed(tiny, ended)


def failed(tiny: Tiny, ended: Ended) -> str:
    assert ended.code == 1, ended.output
    assert "Traceback" not in ended.output, ended.output
    errors = [line for line in ended.output.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1, ended.output
    assert not (tiny.folder / "out").exists()
    return errors[0]


@pytest.mark.parametrize("limit", [1_000, 20_000, 100_000])
def test_no_room_for_the_calibration(tiny: Tiny, forks: Forks, whole: bytes, limit: int) -> None:
    """Files may not grow beyond the limit: snapshots, parts, and the calibration file."""
    assert len(whole) > limit
    error = limited(forks, tiny, calibrate(tiny), RLIMIT_FSIZE=limit)
    assert "File too large" in error
    assert not tiny.path.exists()
    assert forks.run(*calibrate(tiny)).code == 0
    assert tiny.path.read_bytes() == whole


def test_no_room_for_the_merged_model(
    tiny: Tiny, forks: Forks, whole: bytes, merged: dict[str, str]
) -> None:
    tiny.path.write_bytes(whole)
    assert "mergekit could not merge" in limited(forks, tiny, merge(tiny), RLIMIT_FSIZE=20_000)
    assert forks.run(*merge(tiny)).code == 0
    assert model(tiny) == merged


def short_of_memory(forks: Forks, what: tuple[object, ...], stop_at: str) -> Ended:
    """From that change of the file system on, memory for small things only."""
    pid = forks.start(*what, stop_at=stop_at)
    assert wait_for_stop(pid)
    return with_little_memory(forks, pid)


def with_little_memory(forks: Forks, pid: int) -> Ended:
    """The stopped process goes on, with `ROOM` more than it has."""
    used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    _, most = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (used + ROOM, most))
    os.kill(pid, signal.SIGCONT)
    return forks.wait()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits other processes")
@pytest.mark.parametrize("layer", [0, 1])
def test_no_memory_in_a_layer(wide: Tiny, forks: Forks, layer: int) -> None:
    """While that layer's results are written; with memory again, the run goes on to the same file.

    They are written while the next layer computes, and no layer begins before they are: memory
    ends somewhere in the next layer, which has what it needs already or not.
    """
    wide.path.unlink(missing_ok=True)
    assert forks.run(*calibrate(wide)).code == 0
    whole = wide.path.read_bytes()
    wide.path.unlink()
    ended = short_of_memory(forks, calibrate(wide), f"layer-{layer:05d}.safetensors")
    error = failed(wide, ended)
    ended_in = re.search(rf"out of memory in layer (\d) of {LAYERS} \(", error)
    assert ended_in, error
    assert int(ended_in[1]) in {layer + 2, layer + 3}
    assert "smaller --activation-budget" in error
    check_calibration(wide, whole)
    assert not wide.path.exists()
    ended = forks.run(*calibrate(wide)[:-1])
    assert ended.code == 0, ended.output
    assert re.search(rf"\(continued after [{layer + 1}{layer + 2}]\)", ended.output), ended.output
    assert wide.path.read_bytes() == whole


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits other processes")
def test_no_memory_in_the_merge(wide: Tiny, forks: Forks) -> None:
    assert forks.run(*merge(wide)).code == 0
    whole = model(wide)
    shutil.rmtree(wide.folder / "out")
    error = failed(wide, short_of_memory(forks, merge(wide), "out"))
    assert re.match(r"Error: out of memory in (the )?merge \(", error)
    assert "smaller --out-shard-size" in error
    error = failed(wide, short_of_memory_after(8, wide, forks))
    assert re.match(r"Error: out of memory in (the )?merge \(", error)
    assert forks.run(*merge(wide)).code == 0
    assert model(wide) == whole


def short_of_memory_after(shards: int, wide: Tiny, forks: Forks) -> Ended:
    """A merge that has written so many shards when there is no more memory for large things."""
    for _ in range(20):
        pid = forks.start(*merge(wide))
        limit = time.monotonic() + HANGS
        while len(list(wide.folder.glob("out/**/model*.safetensors"))) < shards:
            assert time.monotonic() < limit
            time.sleep(0.001)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        if wait_for_stop(pid):
            return with_little_memory(forks, pid)
        assert forks.wait().code == 0  # it was faster
        shutil.rmtree(wide.folder / "out")
    pytest.fail("every merge was faster")


@pytest.mark.parametrize("damage", ["gone", "cut"])
@pytest.mark.parametrize("role", ["reasoning", "instruct", "pretrained"])
def test_a_shard_is_lost_midway(
    tiny: Tiny, forks: Forks, whole: bytes, role: str, damage: str
) -> None:
    """After the first layer; with the shard back, the run goes on to the same file."""
    shard = max((tiny.folder / role).glob("*.safetensors"))
    backup = tiny.folder / "backup"
    pid = forks.start(*calibrate(tiny), stop_at="layer-00000.safetensors")
    assert wait_for_stop(pid)
    shard.rename(backup)
    if damage == "cut":
        shard.write_bytes(backup.read_bytes()[: backup.stat().st_size // 2])
    os.kill(pid, signal.SIGCONT)
    ended = forks.wait()
    error = failed(tiny, ended)
    assert "cannot read tensor" in error or shard.name in error
    assert not tiny.path.exists()
    backup.replace(shard)
    assert forks.run(*calibrate(tiny)).code == 0
    assert tiny.path.read_bytes() == whole


def test_a_shard_is_lost_before_the_merge(
    tiny: Tiny, forks: Forks, whole: bytes, merged: dict[str, str]
) -> None:
    tiny.path.write_bytes(whole)
    shard = max((tiny.folder / "instruct").glob("*.safetensors"))
    pid = forks.start(*merge(tiny), stop_at="out")
    assert wait_for_stop(pid)
    content = shard.read_bytes()
    shard.unlink()
    os.kill(pid, signal.SIGCONT)
    failed(tiny, forks.wait())
    shard.write_bytes(content)
    assert forks.run(*merge(tiny)).code == 0
    assert model(tiny) == merged


@pytest.mark.slow
def test_interruptions(tiny: Tiny, forks: Forks, whole: bytes) -> None:
    """Ctrl-C at random moments: exit code 130, one line, and a run that goes on."""
    for moment in moments(3 * LAYERS, 2, seed=4):
        pid = forks.start(*calibrate(tiny), stop_at=f"layer-{moment % LAYERS:05d}")
        if wait_for_stop(pid):
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGCONT)
        ended = forks.wait()
        assert ended.code == 130, ended.output
        assert ended.output.startswith("Interrupted"), ended.output
        check_calibration(tiny, whole)
    assert forks.run(*calibrate(tiny)).code == 0
    assert tiny.path.read_bytes() == whole


def without_models(tiny: Tiny) -> list[tuple[object, ...]]:
    """The commands that open a calibration file."""
    alpha = {
        "alpha": [0.5] * 4 * LAYERS,
        "axes_info": {
            "flat_index": [[n, h, "QK"] for n in range(LAYERS) for h in range(4)],
        },
    }
    (tiny.folder / "alpha.json").write_text(json.dumps(alpha))
    converted = ("-o", tiny.folder / "converted.rain.safetensors")
    return [
        ("inspect", tiny.path),
        ("convert-alpha", tiny.folder / "alpha.json", tiny.path, *converted),
    ]


def with_models(tiny: Tiny) -> list[tuple[object, ...]]:
    """Every command that opens models; those that need an earlier one's result after it."""
    data, out, reasoning = (tiny.folder / name for name in ("reasoning.jsonl", "out", "reasoning"))
    measured = ("--against", reasoning, "--reasoning-data", data, "--samples", 1)
    answers = ("--generate", 1, "--max-new-tokens", 4)
    swept = ("--lambda", 1, "-o", tiny.folder / "swept", "--table-only", "--samples", 1)
    page = ("-o", tiny.folder / "page.html")
    return [
        ("calibrate", config(tiny), "--plan"),
        calibrate(tiny),
        merge(tiny),
        ("verify", out, *measured, *answers, "--card"),
        ("card", out),
        ("sweep", config(tiny), *swept),
        ("report", tiny.path, "--merged", out, *measured, *page),
        ("data", "check", data, "--model", reasoning),
        ("data", "check", tiny.folder / "instruction.jsonl", "--model", reasoning),
    ]


def test_models_are_never_opened_for_writing(
    tiny: Tiny, forks: Forks, merged: dict[str, str]
) -> None:
    """By what Python did, by what the kernel saw, by content and times; the other inputs too."""
    names = ("reasoning", "instruct", "pretrained", "reasoning.jsonl", "instruction.jsonl")
    inputs = [*(tiny.folder / name for name in names), config(tiny)]
    before = [stamps(path) for path in inputs]
    with untouched(*inputs):
        for command in with_models(tiny):
            succeed(forks.run(*command), inputs)
        assert merged.items() <= model(tiny).items()
        with untouched(tiny.path):
            for command in without_models(tiny):
                succeed(forks.run(*command), [*inputs, tiny.path])
            out = tiny.folder / "stock"
            ended = forks.run(config(tiny), out, "--quiet", program="mergekit-yaml")
            succeed(ended, [*inputs, tiny.path])
            assert (out / "config.json").exists()
    assert [stamps(path) for path in inputs] == before


def succeed(ended: Ended, inputs: list[Path]) -> None:
    """Well, but for random models, which are damaged; and none of the inputs was written to."""
    assert ended.code in (0, DAMAGED), ended.output
    assert not [path for path in ended.written for item in inputs if str(item) in path]


def stamps(path: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of change of a file, or of all in a folder."""
    files = [path, *sorted(path.rglob("*"))]
    return {
        str(file): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in files
        if file.is_file()
    }


@pytest.mark.parametrize(
    "act", ["exec 3<>model", "touch -a model", "touch lock", "rm model", "mv model other"]
)
def test_the_watch_sees_what_compiled_code_does(tmp_path: Path, act: str) -> None:
    """Each of what must not happen, by a program that is no Python; what may happen is nothing."""
    (tmp_path / "model").write_text("weights")
    here: dict[str, Any] = {"cwd": tmp_path, "stdout": subprocess.DEVNULL}
    with untouched(tmp_path):
        subprocess.run(["/bin/sh", "-c", "cat model; stat model"], check=True, **here)
    with pytest.raises(AssertionError, match=r"model|lock"), untouched(tmp_path):
        subprocess.run(["/bin/sh", "-c", act], check=True, **here)


def permitted(ended: Ended) -> Ended:
    if ended.code == NOT_PERMITTED:
        pytest.skip("this system lets its users mount nothing; see the tests with limits")
    return ended


def test_full_disk(tiny: Tiny, forks: Forks, whole: bytes) -> None:
    """A file system of its own for all that the calibration writes, smaller than that."""
    home = tiny.path.parent
    settings = tiny.folder / "config.yml"
    config(tiny).rename(settings)
    for size in (2**13, 2**17, 2**18):
        small = {str(home): size}
        ended = permitted(forks.run("calibrate", settings, *OPTIONS, small=small))
        assert "No space left on device" in failed(tiny, ended)
    ended = forks.run("calibrate", settings, *OPTIONS)
    assert ended.code == 0, ended.output
    assert tiny.path.read_bytes() == whole


def test_read_only_folders(tiny: Tiny, forks: Forks, merged: dict[str, str]) -> None:
    """Models that nobody can write are enough; a result that cannot be written is one message."""
    models = [str(tiny.folder / role) for role in ("reasoning", "instruct", "pretrained")]
    home = [str(tiny.path.parent)]
    ended = permitted(forks.run(*merge(tiny), read_only=home))
    assert "cannot write the calibration file there (Read-only file system)" in failed(tiny, ended)
    ended = forks.run(*merge(tiny), read_only=models)
    assert ended.code == 0, ended.output
    assert model(tiny) == merged
    out = tiny.folder / "out"
    ended = forks.run(*merge(tiny), read_only=[*models, *home, str(out)])
    assert ended.code == 1
    assert "out: cannot be written (Read-only file system)" in ended.output
    assert model(tiny) == merged


@pytest.fixture(name="locked")
def _locked(tiny: Tiny) -> Iterator[Callable[[str, int], Path]]:
    """Takes permissions away until the test is over: the models' files are those of all tests."""
    before: dict[Path, int] = {}

    def lock(name: str, mode: int) -> Path:
        path = max(tiny.folder.glob(name), default=tiny.folder)
        before[path] = path.stat().st_mode
        path.chmod(mode)
        return path

    yield lock
    for path, mode in reversed(before.items()):
        path.chmod(mode)


@pytest.mark.parametrize(
    "name",
    ["reasoning.jsonl", "reasoning/config.json", "instruct/model-*.safetensors", "pretrained"],
)
def test_input_without_permission(
    tiny: Tiny, forks: Forks, locked: Callable[[str, int], Path], name: str
) -> None:
    path = locked(name, 0)
    error = failed(tiny, forks.run(*calibrate(tiny), plain=True))
    assert str(path) in error
    assert "permission denied" in error.lower()
    assert not tiny.path.exists()


def test_configuration_without_permission(
    tiny: Tiny, forks: Forks, locked: Callable[[str, int], Path]
) -> None:
    path = locked("c/*.yml", 0)
    ended = forks.run(*calibrate(tiny), plain=True)
    assert ended.code == 2
    assert f"Path '{path}' is not readable" in ended.output


def test_output_without_permission(
    tiny: Tiny, forks: Forks, whole: bytes, locked: Callable[[str, int], Path]
) -> None:
    locked("c", 0o500)
    error = failed(tiny, forks.run(*calibrate(tiny), plain=True))
    assert "cannot write the calibration file there (Permission denied)" in error
    locked("c", 0o700)
    tiny.path.write_bytes(whole)
    locked("no such name: the folder", 0o500)
    error = failed(tiny, forks.run(*merge(tiny), plain=True))
    assert "Permission denied" in error
    assert str(tiny.folder / "out") in error


def test_read_permission_is_enough(
    tiny: Tiny, forks: Forks, whole: bytes, merged: dict[str, str], locked: Callable[..., Path]
) -> None:
    """Of models, sets and the configuration."""
    for path in sorted(tiny.folder.rglob("*")):
        name = str(path.relative_to(tiny.folder))
        if name != "c":
            locked(name, 0o500 if path.is_dir() else 0o400)
    for command in (calibrate(tiny), merge(tiny)):
        ended = forks.run(*command, plain=True)
        assert ended.code == 0, ended.output
    assert tiny.path.read_bytes() == whole
    assert model(tiny) == merged
