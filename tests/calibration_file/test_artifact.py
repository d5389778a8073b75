"""The calibration file: written whole or not at all, and never trusted when it is read."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hangs import HANGS
from hypothesis import given
from mutations import FUZZ, chances, changed, edited
from safetensors import safe_open
from safetensors.torch import save_file

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.schema import VERSION, ModelRecord, SitePlan, TensorPlan
from rain_mergekit.calibration_file.writer import write_calibration
from rain_mergekit.errors import RainError
from rain_mergekit.system import atomic_file

DOC = Path(__file__).parents[2] / "docs" / "calibration-file.md"
RECORD = {"reference": "org/model", "revision": "abc", "fingerprint": {"weights": "00"}}
FIT = {"rank": 2, "wanted": 3, "explained": 0.9, "fitted": 0.5}
HEADER: dict[str, Any] = {
    "created_by": "tests",
    "models": {"reasoning": RECORD, "instruct": RECORD, "pretrained": RECORD},
    "data": {"reasoning": {"path": "x", "total": 3}, "instruction": None},
    "settings": {"window": 5},
    "sites": {
        "a": {"width": 6, "rank": 2, "u": "a.u", "v": "a.v", "kept_energy": 0.9, "positions": 4},
        "b": {"width": 6, "rank": 2, "u": "b.u", "v": None, "spectrum": "s", "damping": "d"},
        "c": {"width": 6, "rank": 0, "u": None, "v": None, "kept_energy": 0},
    },
    "tensors": {
        "x": {"site": "a", "shape": [4, 6], "input_axis": -1, "rows": "r", "cols": "c"},
        "w": {"site": "b", "shape": [9, 6], "input_axis": -1, "tokens": True},
        "y": {"site": None, "shape": [6, 4], "input_axis": -2, "rows": None, "cols": None},
        "z": {"site": ["a", "c"], "shape": [2, 4, 6], "input_axis": -1, "rows": "r", "cols": None},
        "v": {"site": None, "shape": [4, 6], "input_axis": -1, "a": "v.a", "b": "v.b", "fit": FIT},
        "u": {"shape": [2, 4, 6], "input_axis": -1, "a": "u.a", "b": "u.b", "ranks": [1, 2]},
        "t": {"site": None, "shape": [4, 6], "input_axis": -1, "start": 0.5},
    },
    "streams": {
        "layers": [
            {
                "name": "l0",
                "fitted": {"answers": 0.1},
                "held_out": {},
                "experts": {"mlp": {"tokens": [9, 3], "few": [1], "worse": {"down_proj": [0]}}},
            }
        ]
    },
    "layers": [{"name": "l0", "stats": {"alpha": "s"}}],
    "warnings": ["careful"],
}


def stored() -> dict[str, torch.Tensor]:
    return {
        "a.u": torch.randn(6, 2),
        "a.v": torch.randn(6, 2),
        "b.u": torch.randn(6, 2).bfloat16(),
        "s": torch.rand(7, dtype=torch.float64),
        "d": torch.rand(2).half(),
        "r": torch.rand(4),
        "c": torch.rand(6),
        "v.a": torch.randn(4, 2),
        "v.b": torch.randn(6, 2),
        "u.a": torch.randn(4, 3),
        "u.b": torch.randn(6, 3),
        "counts": torch.arange(3),
        "nothing": torch.empty(0, 4),
        "flat": torch.empty(4, 0),
    }


HEADER_KEYS = tuple(stored())


def digest(tensor: torch.Tensor) -> str:
    data: Any = tensor.contiguous().flatten()
    raw = bytes(data.view(torch.uint8).numpy()) if data.numel() else b""
    return hashlib.sha256(raw).hexdigest()


def forge(path: Path, header: Any, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    """Write with stock safetensors whatever is asked for, with digests that match it."""
    if isinstance(header, dict) and "tensor_sha256" not in header:
        header = {**header, "tensor_sha256": {k: digest(t) for k, t in tensors.items()}}
    text = header if isinstance(header, str) else json.dumps(header)
    content = {
        "format": "rain-calibration",
        "format_version": "1",
        "header": text,
        "header_sha256": hashlib.sha256(text.encode()).hexdigest(),
        **metadata,
    }
    save_file(tensors, path, metadata=content)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "c.rain.safetensors"
    write_calibration(file, HEADER, stored())
    return file


def use(path: Path) -> None:
    """Everything that a merge or a report does with a file."""
    file = CalibrationFile.open(path)
    for site in file.sites:
        file.factors(site)
    for plan in file.tensors.values():
        file.scale(plan.rows)
        file.scale(plan.cols)
    file.verify()


# Writing and reading


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tensors = stored()
    path = tmp_path / "c"
    write_calibration(path, HEADER, tensors)
    file = CalibrationFile.open(path)
    file.verify()
    assert set(file.keys()) == set(tensors)
    for key, tensor in tensors.items():
        found = file.tensor(key)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
        assert file.header["tensor_sha256"][key] == digest(tensor)
    assert {key: value for key, value in file.header.items() if key != "tensor_sha256"} == HEADER
    assert file.models["instruct"].reference == "org/model"
    assert file.sites["a"].rank == 2
    assert file.sites["b"].damping == "d"
    assert file.tensors["z"].site == ("a", "c")
    assert file.tensors["y"].input_axis == -2
    assert file.scale(None) is None


def test_factors_of_each_kind(path: Path) -> None:
    file = CalibrationFile.open(path)
    oblique, orthogonal, none = (file.factors(site) for site in "abc")
    assert oblique.u is not None
    assert oblique.v is not None
    assert not torch.equal(oblique.u, oblique.v)
    assert orthogonal.u is not None
    assert orthogonal.v is orthogonal.u
    assert orthogonal.u.dtype == torch.float32
    assert none.rank == 0
    assert none.u.shape == none.v.shape == (6, 0)


def test_nothing_is_read_before_it_is_asked_for(path: Path) -> None:
    file = CalibrationFile.open(path)
    assert not file.reads
    file.factors("b")
    assert dict(file.reads) == {"b.u": 1}


def test_stock_safetensors_reads_it(tmp_path: Path) -> None:
    tensors = stored()
    write_calibration(tmp_path / "c", HEADER, tensors)
    with safe_open(tmp_path / "c", framework="pt") as file:
        assert file.metadata()["format"] == "rain-calibration"
        for key, tensor in tensors.items():
            assert torch.equal(file.get_tensor(key), tensor)


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    path = tmp_path / "c"
    odd = {f"odd{i}": torch.ones(i, dtype=torch.float16) for i in (1, 2, 5)}
    write_calibration(path, HEADER, {**odd, **stored()})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    widths = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2}
    for key, entry in json.loads(data[8 : 8 + length]).items():
        if key != "__metadata__":
            assert entry["data_offsets"][0] % widths[entry["dtype"]] == 0, key


def test_same_content_same_bytes(tmp_path: Path) -> None:
    tensors = stored()
    write_calibration(tmp_path / "1", HEADER, tensors)
    backwards = dict(reversed(tensors.items()))
    write_calibration(tmp_path / "2", dict(reversed(HEADER.items())), backwards)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_functions_are_called_in_order_with_one_tensor_alive(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def make(value: torch.Tensor) -> Callable[[], torch.Tensor]:
        def source() -> torch.Tensor:
            assert not [ref for ref in alive if ref() is not None]
            tensor = value.clone()
            alive.append(weakref.ref(tensor))
            return tensor

        return source

    tensors = stored()
    write_calibration(tmp_path / "c", HEADER, {k: make(t) for k, t in tensors.items()})
    assert len(alive) == len(tensors)
    CalibrationFile.open(tmp_path / "c").verify()


def test_strided_tensors_are_stored_in_row_major_order(tmp_path: Path) -> None:
    tensors = stored()
    tensors["a.u"] = torch.randn(2, 6).T
    write_calibration(tmp_path / "c", HEADER, tensors)
    assert torch.equal(CalibrationFile.open(tmp_path / "c").tensor("a.u"), tensors["a.u"])


def test_many_threads_read_at_once(path: Path) -> None:
    file = CalibrationFile.open(path)
    wanted = {key: file.tensor(key) for key in HEADER_KEYS}
    wrong: list[str] = []

    def work() -> None:
        for _ in range(20):
            wrong.extend(key for key in wanted if not torch.equal(file.tensor(key), wanted[key]))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_open_file_keeps_its_content_when_the_path_is_replaced(path: Path) -> None:
    file = CalibrationFile.open(path)
    before = {key: file.tensor(key) for key in HEADER_KEYS}
    write_calibration(path, HEADER, stored())
    assert all(torch.equal(file.tensor(key), tensor) for key, tensor in before.items())
    assert not torch.equal(CalibrationFile.open(path).tensor("a.u"), before["a.u"])


def test_closed(path: Path) -> None:
    file = CalibrationFile.open(path)
    file.close()
    with pytest.raises(RainError, match=r"cannot read tensor 'a\.u'"):
        file.tensor("a.u")


# Whole or not at all


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def failing() -> torch.Tensor:
    raise KeyError("stopped")


def out_of_place() -> torch.Tensor:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("existing", [True, False])
def test_a_failing_source_changes_nothing(tmp_path: Path, *, existing: bool) -> None:
    path = tmp_path / "c"
    if existing:
        path.write_bytes(b"old")
    with pytest.raises(KeyError, match="stopped"):
        write_calibration(path, HEADER, {**stored(), "counts": failing})
    with pytest.raises(RainError, match="tensor 'counts' for the calibration file"):
        write_calibration(path, HEADER, {**stored(), "counts": out_of_place})
    assert names(tmp_path) == (["c"] if existing else [])
    assert not existing or path.read_bytes() == b"old"


KILLED = """
import os, signal, sys, torch
from rain_mergekit.system import atomic_file
from rain_mergekit.calibration_file.writer import write_calibration
def die():
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))
tensors = {"first": torch.ones(300000), "second": die}
write_calibration(sys.argv[1], {}, tensors)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no unnamed files")
@pytest.mark.parametrize("sent", ["SIGKILL", "SIGTERM"])
def test_a_killed_process_leaves_nothing_behind(path: Path, sent: str) -> None:
    before = path.read_bytes()
    command = [sys.executable, "-c", KILLED, str(path), sent]
    done = subprocess.run(command, check=False, capture_output=True, timeout=HANGS)
    assert done.returncode == -getattr(signal, sent), done.stderr
    assert names(path.parent) == [path.name]
    assert path.read_bytes() == before
    use(path)


def test_file_systems_without_unnamed_files(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_file, "_UNNAMED", 0)
    write_calibration(path, HEADER, stored())
    use(path)
    before = path.read_bytes()
    with pytest.raises(KeyError):
        write_calibration(path, HEADER, {**stored(), "counts": failing})
    assert names(path.parent) == [path.name]
    assert path.read_bytes() == before


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for place in ("missing/c", "file/c", "folder"):
        with pytest.raises(RainError, match="cannot write .*" + place):
            write_calibration(tmp_path / place, HEADER, stored())
    assert names(tmp_path) == ["file", "folder"]


def test_read_only_folder() -> None:
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        if user == 0:  # root may write everywhere
            os.seteuid(65534)
        try:
            with pytest.raises(RainError, match=r"cannot write .*Permission denied"):
                write_calibration(Path(folder) / "c", HEADER, stored())
        finally:
            os.seteuid(user)
            Path(folder).chmod(0o755)
        assert names(Path(folder)) == []


@contextmanager
def size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [1000, 402_000])  # while spooling, and in the file itself
def test_no_room_left(path: Path, size: int) -> None:
    before = path.read_bytes()
    with size_limit(size), pytest.raises(RainError, match=r"cannot write .*File too large"):
        write_calibration(path, HEADER, {**stored(), "big": torch.ones(100_000)})
    assert names(path.parent) == [path.name]
    assert path.read_bytes() == before


def test_a_link_keeps_pointing_where_it_does(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real" / "c")
    write_calibration(link, HEADER, stored())
    assert link.is_symlink()
    use(tmp_path / "real" / "c")


def test_new_files_have_ordinary_permissions(path: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    header = copy.deepcopy(HEADER)
    header["sites"]["a"]["rank"] = 3
    with pytest.raises(RainError, match=r"sites\.a\.u"):
        write_calibration(tmp_path / "c", header, stored())
    header["sites"]["a"]["kept_energy"] = float("nan")
    with pytest.raises(RainError, match="not a finite number"):
        write_calibration(tmp_path / "c", header, stored())
    with pytest.raises(RainError, match=r"does not store torch\.complex64"):
        write_calibration(tmp_path / "c", HEADER, {"x": torch.ones(2, dtype=torch.complex64)})
    assert names(tmp_path) == []


# Damaged and hostile files


def opens_with(path: Path, words: str) -> None:
    with pytest.raises(RainError, match=words) as caught:
        CalibrationFile.open(path)
    assert repr(str(path)) in str(caught.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    opens_with(tmp_path / "missing", "does not exist: write it with `mergekit-rain calibrate")
    opens_with(tmp_path, "not a regular file")
    os.mkfifo(tmp_path / "fifo")
    opens_with(tmp_path / "fifo", "not a regular file")
    with pytest.raises(RainError, match="null"):
        CalibrationFile.open("a\0b")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a safetensors file"),
        (b"\x01", "not a safetensors file"),
        (b"\x80\x02}q\x00.", "not a safetensors file"),
        (b"PK\x03\x04" + b"\0" * 60, "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
        ((2).to_bytes(8, "little") + b"{}", "not a calibration file"),
        ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "not valid JSON"),
        ((90_000).to_bytes(8, "little") + b"[" * 90_000, "nested too deeply|not valid JSON"),
        ((19).to_bytes(8, "little") + b'{"__metadata__": 3}', "metadata is not an object"),
        ((2).to_bytes(8, "little") + b"{}x", "bytes that belong to nothing"),
    ],
)
def test_what_is_no_calibration(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "c").write_bytes(data)
    opens_with(tmp_path / "c", words)


def test_other_safetensors_files(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "model")
    opens_with(tmp_path / "model", "not a calibration file")


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (str(VERSION + 1), "newer rain_mergekit.*upgrade"),
        ("999999999", "newer rain_mergekit"),
        ("0", "no format version 0"),
        ("1.0", "whole number"),
        ("", "whole number"),
        ("9" * 10, "whole number"),
        ("9" * 5000, "whole number"),
    ],
)
def test_other_versions(tmp_path: Path, version: str, words: str) -> None:
    opens_with(forge(tmp_path / "c", HEADER, stored(), format_version=version), words)


def test_tampered_header(tmp_path: Path) -> None:
    opens_with(forge(tmp_path / "c", HEADER, stored(), header_sha256="0" * 64), "was altered")
    other = hashlib.sha256(b"{}").hexdigest()
    opens_with(forge(tmp_path / "c", HEADER, stored(), header_sha256=other), "was altered")


def test_every_truncation(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    for length in {*range(0, len(data), 61), len(data) - 1, 7, 8, 9}:
        (tmp_path / "cut").write_bytes(data[:length])
        opens_with(tmp_path / "cut", "cannot be used")


def test_every_altered_byte_of_the_tensors(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for position in range(start, len(data)):
        changed = bytearray(data)
        changed[position] ^= 0x10
        (tmp_path / "changed").write_bytes(changed)
        with pytest.raises(RainError, match="was altered"):
            CalibrationFile.open(tmp_path / "changed").verify()


def test_altered_bytes_of_the_header_change_nothing_or_are_refused(
    path: Path, tmp_path: Path
) -> None:
    data = path.read_bytes()
    whole = CalibrationFile.open(path)
    end = 8 + int.from_bytes(data[:8], "little")
    for position in range(end):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        (tmp_path / "changed").write_bytes(changed)
        try:
            file = CalibrationFile.open(tmp_path / "changed")
            file.verify()
        except RainError:
            continue
        assert file.header == whole.header, position
        for key in HEADER_KEYS:
            found, expected = file.tensor(key), whole.tensor(key)
            # One without numbers may have another shape: no digest tells, and nothing uses it.
            assert torch.equal(found, expected) or found.numel() == expected.numel() == 0


def test_a_file_that_becomes_shorter_while_open(tmp_path: Path) -> None:
    path = tmp_path / "c"
    write_calibration(path, HEADER, {**stored(), "big": torch.ones(100_000)})
    file = CalibrationFile.open(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(RainError, match="became shorter"):
        file.verify()


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1] * 9 + [2], "data_offsets": [0, 8]},
        {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
        {"shape": [2]},
        [],
        None,
    ],
)
def test_hostile_container_entries(tmp_path: Path, entry: object) -> None:
    text = json.dumps({"x": entry}).encode()
    (tmp_path / "c").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    opens_with(tmp_path / "c", "tensor 'x'|expected, 8 found")


def test_overlapping_tensors(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    text = json.dumps({"x": entry, "y": entry}).encode()
    (tmp_path / "c").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    opens_with(tmp_path / "c", "does not start where")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"a": 1, "a": 2}', "occurs twice"),
        ('{"a": NaN}', "is not a number"),
        ('{"a": -Infinity}', "is not a number"),
        ('{"a": 1e999}', "too large"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "nested too deeply"),
        ("{}", "tensor_sha256"),
    ],
)
def test_hostile_header_text(tmp_path: Path, text: str, words: str) -> None:
    opens_with(forge(tmp_path / "c", text, {}), words)


BAD_FIELDS: list[tuple[str, Any, str]] = [
    ("models", None, "'models' must be an object"),
    ("models.instruct", [], r"'models\.instruct'"),
    ("models.reasoning.reference", 3, r"'models\.reasoning\.reference' must be a text"),
    ("models.reasoning.revision", 3, "revision"),
    ("models.reasoning.fingerprint", "00", "fingerprint"),
    ("models.reasoning.fingerprint.weights", 0, "weights"),
    ("kind", "ties", "'kind' must be one of rain, regmean, aim"),
    ("gamma", "1", "'gamma' must be a finite number"),
    ("gamma", 1.5, "'gamma' must be a number from 0 to 1"),
    ("gamma", -0.1, "'gamma' must be a number from 0 to 1"),
    ("sites", [], "'sites' must be an object"),
    ("sites.a", None, r"'sites\.a'"),
    ("sites.a.width", 0, "whole number of at least 1"),
    ("sites.a.width", True, "width"),
    ("sites.a.width", 1 << 80, r"\[4, 6\]|shape"),
    ("sites.a.width", 7, "shape"),
    ("sites.a.rank", 7, "at most 6"),
    ("sites.a.rank", -1, "rank"),
    ("sites.a.rank", 1, r"shape \[6, 1\]"),
    ("sites.a.rank", 2.0, "rank"),
    ("sites.a.u", None, "null at rank 0"),
    ("sites.a.u", "no", "key of a stored tensor"),
    ("tensors.v.a", None, "given together with b"),
    ("tensors.v.a", "v.b", "floating-point tensor of shape"),
    ("tensors.v.b", "nothing", "floating-point tensor of shape"),
    ("tensors.v.fit", {"rank": "2"}, "a finite number"),
    ("tensors.t.start", 1.5, "a number from 0 to 1"),
    ("tensors.t.start", True, "a finite number"),
    ("tensors.x.start", 0.5, "left out, but for a matrix"),
    ("tensors.v.ranks", [2], "left out, but for experts"),
    ("tensors.u.ranks", None, "a list of whole numbers"),
    ("tensors.u.ranks", [1, -1], "a list of whole numbers"),
    ("tensors.u.ranks", [3], "a list of 2 ranks, 3 together"),
    ("tensors.u.ranks", [1, 1], "a list of 2 ranks, 3 together"),
    ("tensors.u.shape", [4, 6], "left out, but for experts"),
    ("streams.layers.0.experts.mlp.tokens", [1.5], "a list of whole numbers"),
    ("streams.layers.0.experts.mlp.few", None, "a list of whole numbers"),
    ("streams.layers.0.experts.mlp.worse", [], "an object"),
    ("streams", {"layers": 1}, "a list"),
    ("streams", {"layers": [{"name": "l", "fitted": {"a": "x"}, "held_out": {}}]}, "a finite"),
    ("sites.a.u", ["a.u"], "must be a text"),
    ("sites.a.u", "counts", "floating-point"),
    ("sites.a.v", "r", "shape"),
    ("sites.c.v", "nothing", "v"),
    ("sites.c", {"width": 4, "rank": 0, "v": "flat"}, "null where u is null"),
    ("sites.b.spectrum", "a.u", "spectrum"),
    ("sites.b.damping", "s", "damping"),
    ("sites.a.kept_energy", "0.9", "finite number"),
    ("sites.a.kept_energy", 10**400, "finite number"),
    ("sites.a.kept_energy", True, "finite number"),
    ("sites.a.positions", -1, "positions"),
    ("tensors", 1, "tensors"),
    ("tensors.x", "a", r"'tensors\.x'"),
    ("tensors.x.shape", [4], "2 or 3 sizes"),
    ("tensors.x.shape", None, "2 or 3 sizes"),
    ("tensors.x.shape", [4, 0], "sizes above 0"),
    ("tensors.x.shape", [4, "6"], "sizes above 0"),
    ("tensors.x.shape", [5, 6], "rows"),
    ("tensors.x.shape", [4, 7], "width 7"),
    ("tensors.x.input_axis", 1, "-1 or -2"),
    ("tensors.x.input_axis", -2, "width 4"),
    ("tensors.x.input_axis", -1.0, "-1 or -2"),
    ("tensors.x.site", "no", "name of a site"),
    ("tensors.x.site", {}, "name of a site"),
    ("tensors.x.site", ["a", "a"], "experts"),
    ("tensors.z.site", ["a"], "experts"),
    ("tensors.z.site", ["a", None], "name of a site"),
    ("tensors.z.site", ["a", ["a"]], "name of a site"),
    ("tensors.x.rows", "c", "rows"),
    ("tensors.x.cols", "r", "cols"),
    ("tensors.x.tokens", 1, "true or false"),
    ("tensors.z.tokens", True, "a row for each token"),
    ("tensor_sha256", {}, "differ"),
    ("tensor_sha256.r", 5, "tensor_sha256"),
    ("tensor_sha256.more", "00", "differ"),
    ("data", [], "data"),
    ("settings", "x", "settings"),
    ("layers", {"a": 1}, "'layers' must be a list"),
    ("layers", [1], r"layers\.0"),
    ("layers.0.name", None, "name"),
    ("layers.0.stats", None, "stats"),
    ("layers.0.stats.alpha", "no", "key of a stored tensor"),
    ("warnings", "careful", "a list"),
    ("warnings", [1], "a list of texts"),
    ("created_by", 1, "created_by"),
]


def replaced(field: str, value: object, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    header = copy.deepcopy(HEADER)
    header["tensor_sha256"] = {key: digest(tensor) for key, tensor in tensors.items()}
    known = {key: key for key in tensors}  # keys with dots, where a path would split them
    place: Any = header
    parts = field.split(".")
    for part in parts[:-1]:
        place = place[int(part)] if isinstance(place, list) else place[part]
    place[known.get(parts[-1], parts[-1])] = value
    return header


@pytest.mark.parametrize(("field", "value", "words"), BAD_FIELDS)
def test_wrong_fields(tmp_path: Path, field: str, value: object, words: str) -> None:
    tensors = stored()
    opens_with(forge(tmp_path / "c", replaced(field, value, tensors), tensors), words)


def test_optional_fields_can_be_left_out(tmp_path: Path) -> None:
    header = copy.deepcopy(HEADER)
    for name in ("created_by", "data", "settings", "layers", "warnings"):
        del header[name]
    for record in header["models"].values():
        record.pop("revision", None)
        record.pop("fingerprint", None)
    header["more"] = {"of": "this"}
    use(forge(tmp_path / "c", header, stored()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["a.u", "a.v", "r"])
def test_factors_and_scales_that_are_not_finite(tmp_path: Path, key: str, value: float) -> None:
    tensors = stored()
    tensors[key].view(-1)[1] = value
    path = forge(tmp_path / "c", HEADER, tensors)
    with pytest.raises(RainError, match=f"tensor '{key}' holds NaN or infinite values"):
        use(path)


def test_unknown_key(path: Path) -> None:
    with pytest.raises(RainError, match="has no tensor 'no'"):
        CalibrationFile.open(path).tensor("no")


def test_header_larger_than_the_format_allows(tmp_path: Path) -> None:
    """The library that reads it elsewhere has this limit; nothing is left of the file."""
    with pytest.raises(RainError, match=r"the header needs 1000\d+ bytes, more than safetensors"):
        write_calibration(tmp_path / "c", {**HEADER, "created_by": "x" * 10**8}, stored())
    assert names(tmp_path) == []


# Fuzzing: whatever the bytes are, the answer is a calibration or a RainError


def refusal(path: Path) -> str:
    """What is said about a file; nothing when it can be used."""
    try:
        use(path)
    except RainError as error:
        return str(error)
    return ""


@FUZZ
@given(chance=chances)
def test_fuzzed_bytes(path: Path, chance: Random) -> None:
    fuzzed = path.with_name("fuzzed")
    fuzzed.write_bytes(edited(path.read_bytes(), chance))
    assert len(refusal(fuzzed)) < 1000


@FUZZ
@given(chance=chances)
def test_fuzzed_headers(path: Path, chance: Random) -> None:
    """With digests that match, as somebody makes them on purpose."""
    tensors = stored()
    header = changed(replaced("created_by", "fuzz", tensors), chance, "a", "b", "c", *tensors)
    message = refusal(forge(path.with_name("fuzzed"), header, tensors))
    assert len(message.encode()) < 1000  # and can be printed, whatever the file says


# The document


def test_the_example_of_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = DOC.read_text(encoding="utf-8").split("```python\n")[1:]
    monkeypatch.chdir(tmp_path)
    exec(compile(example.split("```")[0], str(DOC), "exec"), {"__name__": "example"})  # noqa: S102
    file = CalibrationFile.open(tmp_path / "example.rain.safetensors")
    file.verify()
    factors = file.factors("layer0.attention")
    assert factors.u is not None
    assert factors.v is factors.u
    torch.testing.assert_close(factors.u.T @ factors.u, torch.eye(2))
    plan = file.tensors["model.layers.0.self_attn.q_proj.weight"]
    assert plan.shape == (6, 8)
    assert torch.equal(file.scale(plan.rows), torch.full((6,), 0.5))


def names_in(section: str) -> set[str]:
    return {name for item in HEADER[section].values() for name in item}


def test_the_header_here_has_every_field() -> None:
    """Those that are fuzzed and looked for in the document."""
    for section, kind in (("models", ModelRecord), ("sites", SitePlan), ("tensors", TensorPlan)):
        others = {"fit"} if section == "tensors" else set()
        assert names_in(section) == {field.name for field in dataclasses.fields(kind)} | others


def test_the_document_names_every_field() -> None:
    text = DOC.read_text(encoding="utf-8")
    fields = {*HEADER, "tensor_sha256", "header", "header_sha256", "format", "format_version"}
    fields |= names_in("models") | names_in("sites") | names_in("tensors")
    assert not [name for name in fields if f"`{name}`" not in text]


# Messages in full: what they name, and what they say to do


def said_of(path: Path) -> str:
    with pytest.raises(RainError) as caught:
        use(path)
    return str(caught.value)


def by_hand(path: Path, **metadata: str) -> Path:
    """A file of metadata alone, which stock safetensors would not write."""
    text = json.dumps({"__metadata__": metadata}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path


def test_messages_of_files_that_cannot_be_used(tmp_path: Path) -> None:
    path, name = tmp_path / "c", repr(str(tmp_path / "c"))
    known = {"format": "rain-calibration", "format_version": "1"}
    broken = hashlib.sha256(b"{").hexdigest()
    for metadata, said in (
        ({**known}, "its metadata has no text named header"),
        (
            {**known, "header": "{}", "header_sha256": "ab"},
            "its header was altered: the content does not match header_sha256",
        ),
        # Half a character: there is no digest of it, but that of a file that shows it as "?".
        (
            {**known, "header": "\ud800", "header_sha256": "ab"},
            "its header was altered: the content does not match header_sha256",
        ),
    ):
        found = said_of(by_hand(path, **metadata))
        assert found == f"calibration file {name} cannot be used: {said}"
    found = said_of(by_hand(path, **known, header="{", header_sha256=broken))
    assert found.startswith(f"calibration file {name} cannot be used: the header is not valid JSON")


def test_messages_of_files_that_cannot_be_opened(tmp_path: Path) -> None:
    assert said_of(tmp_path) == (
        f"calibration file {str(tmp_path)!r} cannot be used: it is not a regular file"
    )
    (tmp_path / "file").write_bytes(b"")
    below = tmp_path / "file" / "c"
    assert said_of(below) == f"cannot open calibration file {str(below)!r}: Not a directory"
    missing = tmp_path / "missing"
    assert said_of(missing) == (
        f"calibration file {str(missing)!r} does not exist: write it with "
        "`mergekit-rain calibrate CONFIG`, or correct `parameters.calibration`"
    )


def test_messages_of_tensors(tmp_path: Path, path: Path) -> None:
    tensors = stored()
    tensors["r"][0] = float("nan")
    forged = forge(tmp_path / "forged", HEADER, tensors)
    assert said_of(forged) == (
        f"calibration file {str(forged)!r}: tensor 'r' holds NaN or infinite values; "
        "calibrate again"
    )
    file = CalibrationFile.open(path)
    assert file.path == str(path)
    content = bytearray(path.read_bytes())
    content[content.index(bytes(file.tensor("a.u").numpy().tobytes()))] ^= 1
    path.write_bytes(content)
    with pytest.raises(RainError) as caught:
        CalibrationFile.open(path).tensor("a.u")
    assert str(caught.value) == (
        f"calibration file {str(path)!r} was altered: the content of tensor 'a.u' does "
        "not match its digest; calibrate again, or fetch the file again"
    )


def test_every_read_is_counted(path: Path) -> None:
    file = CalibrationFile.open(path)
    for _ in range(3):
        file.tensor("r")
    assert dict(file.reads) == {"r": 3}
