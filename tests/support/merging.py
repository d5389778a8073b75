"""Tiny real models, calibration files over them, and the merge that mergekit-yaml should make.

The expected weights are computed here densely in float64, from the same numbers that go into the
file, never from what the package reads back.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from click.testing import CliRunner
from hangs import HANGS
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rain_mergekit.calibration_file.writer import write_calibration
from rain_mergekit.models.fingerprint import fingerprint

LAYERS, WIDTH, INNER = 2, 32, 48
SITES = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "mlp": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_model(folder: Path, kind: str, dtype: torch.dtype, width: int = WIDTH) -> Path:
    """A random GQA model with a tiny tokenizer, saved as a user would have it."""
    sizes = {
        "hidden_size": width,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 40,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    model.to(dtype).save_pretrained(folder)
    words = ["[UNK]", "<|user|>", "<|assistant|>", "<think>", "</think>"]
    vocabulary = {word: i for i, word in enumerate(words + [f"w{i}" for i in range(35)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")  # noqa: S106
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Trio:
    """Folders of the three models, and their weights."""

    reasoning: Path
    instruct: Path
    pretrained: Path

    @classmethod
    def make(cls, folder: Path, kind: str = "qwen2", dtype: torch.dtype = torch.float32) -> Trio:
        roles = ("reasoning", "instruct", "pretrained")
        return cls(*(make_model(folder / role, kind, dtype) for role in roles))

    def weights(self, role: str) -> dict[str, Tensor]:
        return load_file(getattr(self, role) / "model.safetensors")

    def records(self) -> dict[str, Any]:
        return {
            role: {
                "reference": str(getattr(self, role)),
                "revision": None,
                "fingerprint": fingerprint(str(getattr(self, role))),
            }
            for role in ("reasoning", "instruct", "pretrained")
        }


@dataclass
class Calibration:
    """What goes into a file, in float64, by tensor name."""

    header: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    projectors: dict[str, Tensor] = field(default_factory=dict)  # U Vᵀ by site, dense

    def write(self, path: Path) -> Path:
        write_calibration(path, self.header, {k: t.float() for k, t in self.tensors.items()})
        return path

    def expected(self, trio: Trio, name: str, strength: float) -> Tensor:
        """Eq. 16 for one listed tensor, in float64."""
        plan = self.header["tensors"][name]
        w_r, w_i, w_b = (
            trio.weights(role)[name].double() for role in ("reasoning", "instruct", "pretrained")
        )
        rows, cols = (
            torch.ones(size, dtype=torch.float64)
            if plan[axis] is None
            else self.tensors[plan[axis]]
            for axis, size in zip(("rows", "cols"), w_r.shape, strict=True)
        )
        keep = torch.eye(w_r.shape[1], dtype=torch.float64)
        if plan["site"] is not None:
            keep = keep - self.projectors[plan["site"]]
        return w_r + strength * (torch.diag(rows) @ (w_i - w_b) @ torch.diag(cols)) @ keep


def add_site(calibration: Calibration, site: str, width: int, rank: int, kind: str) -> None:
    """A random basis: orthonormal U, and V oblique (Vᵀ U = 1), soft (V = U D), or U itself."""
    u = torch.linalg.qr(torch.randn(width, max(rank, 1), dtype=torch.float64))[0].float().double()
    v = u
    if kind == "oblique":
        metric = torch.eye(width, dtype=torch.float64) + torch.ones(width, width) / width
        v = (metric @ u) @ torch.linalg.inv(u.mT @ metric @ u)
    elif kind == "soft":
        v = u * torch.rand(max(rank, 1), dtype=torch.float64)
    keys: dict[str, str | None] = {"u": None, "v": None}
    if rank:
        keys["u"], calibration.tensors[f"{site}.u"] = f"{site}.u", u
        if v is not u:
            keys["v"], calibration.tensors[f"{site}.v"] = f"{site}.v", v.float().double()
    none = torch.zeros(width, width, dtype=torch.float64)
    calibration.projectors[site] = u @ v.mT if rank else none
    calibration.tensors[f"{site}.spectrum"] = torch.rand(width, dtype=torch.float64)
    calibration.header["sites"][site] = {
        "width": width,
        "rank": rank,
        "kept_energy": 0.9 if rank else 0.0,
        "positions": 12,
        **keys,
        "spectrum": f"{site}.spectrum",
        "damping": None,
    }


def make_calibration(
    trio: Trio, *, project: bool = True, scale: bool = True, layers: Sequence[int] = (0, 1)
) -> Calibration:
    """All projections of the given layers: four sites each, oblique, orthogonal, soft, rank 0."""
    header = {"created_by": "tests", "models": trio.records(), "sites": {}, "tensors": {}}
    header["settings"] = {"accept": ["large_task_vector"]}  # random models have nothing in common
    calibration = Calibration(header)
    shapes = {name: tuple(tensor.shape) for name, tensor in trio.weights("reasoning").items()}
    kinds = {"attention": "oblique", "output": "orthogonal", "mlp": "soft", "down": "rank0"}
    for layer in layers:
        for kind, modules in SITES.items():
            site = f"model.layers.{layer}.{kind}"
            width = shapes[f"model.layers.{layer}.{modules[0]}.weight"][1]
            rank = 5 if project and kind != "down" else 0
            add_site(calibration, site, width, rank, kinds[kind])
            for module in modules:
                name = f"model.layers.{layer}.{module}.weight"
                scales = _scales(calibration, name, shapes[name]) if scale else {}
                header["tensors"][name] = {  # type: ignore[index]
                    "site": site if project else None,
                    "shape": list(shapes[name]),
                    "input_axis": -1,
                    "rows": None,
                    "cols": None,
                    **scales,
                }
    return calibration


def _scales(calibration: Calibration, name: str, shape: tuple[int, ...]) -> dict[str, str]:
    axis, size = ("cols", shape[1]) if "o_proj" in name else ("rows", shape[0])
    key = f"{name}.{axis}"
    calibration.tensors[key] = (0.5 + torch.rand(size)).double()
    return {axis: key}


def config(trio: Trio, calibration: Path | None, **changes: Any) -> dict[str, Any]:
    """The YAML of a merge; `changes` replaces top-level entries, `None` removes them."""
    content: dict[str, Any] = {
        "merge_method": "rain",
        "base_model": str(trio.reasoning),
        "models": [
            {"model": str(trio.instruct), "parameters": {"role": "instruct"}},
            {"model": str(trio.pretrained), "parameters": {"role": "pretrained"}},
        ],
        "parameters": {} if calibration is None else {"calibration": str(calibration)},
    }
    content["parameters"].update(changes.pop("parameters", {}))
    content.update(changes)
    return {key: value for key, value in content.items() if value is not None}


@dataclass(frozen=True)
class Outcome:
    """What the command left behind."""

    code: int
    output: str
    folder: Path

    def weights(self) -> dict[str, Tensor]:
        assert self.code == 0, self.output
        return load_file(self.folder / "model.safetensors")

    def error(self) -> str:
        """The one error message; nothing was written."""
        assert self.code != 0, self.output
        assert "Traceback" not in self.output, self.output
        lines = [line for line in self.output.splitlines() if line.startswith("Error:")]
        assert len(lines) == 1, self.output
        assert not list(self.folder.rglob("*.safetensors"))
        return self.output[self.output.index("Error:") :]


def merge(folder: Path, content: Mapping[str, Any], *options: str) -> Outcome:
    """The real command in this process: the same entry, without nine seconds of imports."""
    from mergekit.scripts.run_yaml import main  # noqa: PLC0415

    arguments = _prepare(folder, content)
    result = CliRunner().invoke(main, [*arguments, *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.output, folder / "merged")


def merge_process(folder: Path, content: Mapping[str, Any], *options: str) -> Outcome:
    """The real command in its own process, as a user starts it."""
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml"]
    done = subprocess.run(
        [*command, *_prepare(folder, content), *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS,
    )
    return Outcome(done.returncode, done.stdout + done.stderr, folder / "merged")


def _prepare(folder: Path, content: Mapping[str, Any]) -> list[str]:
    folder.mkdir(exist_ok=True)
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(dict(content)))
    return [str(path), str(folder / "merged"), "--quiet"]


def check_merge(
    found: dict[str, torch.Tensor], trio: Trio, calibration: Calibration, strength: float
) -> None:
    """Listed tensors equal the dense float64 computation; all others are bit-identical."""
    base = trio.weights("reasoning")
    listed = calibration.header["tensors"]
    assert len(listed) == 7 * LAYERS
    assert set(base) <= set(found)
    for name, tensor in base.items():
        assert found[name].dtype == tensor.dtype
        if name not in listed:
            assert torch.equal(found[name], tensor), name
            continue
        wanted = calibration.expected(trio, name, strength)
        rtol, atol = (1e-5, 1e-5) if tensor.dtype == torch.float32 else (2**-7, 1e-6)
        torch.testing.assert_close(found[name].double(), wanted, rtol=rtol, atol=atol)
        assert not torch.equal(found[name], tensor), name
