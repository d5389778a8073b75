"""The other direction: an agent is the base model and keeps its calls, thinking comes from another.

Untrained models: which tokens have which teacher is compared with texts marked by hand, and the
merge is calibrated and made by the real commands.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import merging
import pytest
import torch
import yaml
from commands import run
from safetensors.torch import load_file
from tiny import TEMPLATE, Tiny

from rain_mergekit.calibration.samples import load_samples
from rain_mergekit.calibration.stream_texts import stream_texts
from rain_mergekit.calibration.token_teachers import GROUPS
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.config.merge_config import read_config
from rain_mergekit.models.loading import LoadOptions, open_trio

TAGS = {"markers": {"open": "<tool_call>", "close": "</tool_call>"}, "blocks": "optional"}
NONE = {"markers": "none"}
CALL = '<tool_call>\n{"name": "days", "arguments": {"weeks": 2}}\n</tool_call>'
THOUGHT = "<think>\nA week has seven days, so two have fourteen.\n</think>\n\n"
# The donor's template opens the block itself, as those of many reasoning models do.
OPENING = TEMPLATE.replace("<|assistant|>{% endif", "<|assistant|><think>\n{% endif")


@pytest.fixture(scope="module", name="tiny")
def _tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    tiny = Tiny.make(tmp_path_factory.mktemp("agent"), "qwen2")
    asked = [
        {"role": "system", "content": "You have the tool days."},
        {"role": "user", "content": "How many days are in two weeks?"},
    ]
    later = [*asked, {"role": "assistant", "content": CALL}, {"role": "tool", "content": "14"}]
    stays = [
        {"messages": asked, "output": CALL},
        {"messages": later, "output": "There are 14 days."},
        {"prompt": "Is 51 prime?", "output": CALL},
    ]
    comes = [
        {"prompt": "Count to three.", "output": f"{THOUGHT}one, two, three."},
        {"prompt": "Which colour has grass?", "output": THOUGHT + CALL},
    ]
    for name, samples in (("stays", stays), ("comes", comes)):
        lines = [json.dumps(sample) + "\n" for sample in samples]
        (tiny.folder / f"{name}.jsonl").write_text("".join(lines))
    (tiny.folder / "instruct" / "chat_template.jinja").write_text(OPENING)
    return tiny


def content(tiny: Tiny, name: str, **settings: Any) -> dict[str, Any]:
    found = tiny.content(parameters={"calibration": str(tiny.folder / f"{name}.rain.safetensors")})
    sets = {part: str(tiny.folder / f"{part}.jsonl") for part in ("stays", "comes")}
    rain = {"reasoning_data": sets["stays"], "instruction_data": sets["comes"]}
    section = {**rain, "accept": ["no_thinking"], "window": 2, **settings}
    return {**found, "models": found["models"][:1], "rain": section}


def written(tiny: Tiny, name: str, **settings: Any) -> Path:
    path = tiny.folder / f"{name}.yml"
    path.write_text(yaml.safe_dump(content(tiny, name, **settings)))
    return path


def groups(tiny: Tiny, **settings: Any) -> list[list[tuple[str, str]]]:
    """Each text of both sets as runs of tokens of one group: (group, text)."""
    config = read_config(written(tiny, "groups", **settings))
    trio = open_trio(config, LoadOptions())
    texts = stream_texts(config.settings, trio, load_samples(config.settings, trio))
    assert not texts.dropped
    tokenizer = tiny.tokenizer()
    found = []
    for text in texts.all:
        runs: list[tuple[str, list[int]]] = []
        for token, number in zip(text.input_ids, text.groups, strict=True):
            if not runs or runs[-1][0] != GROUPS[number]:
                runs.append((GROUPS[number], []))
            runs[-1][1].append(token)
        found.append([(name, tokenizer.decode(ids)) for name, ids in runs])
    return found


def joined(runs: list[tuple[str, str]], *names: str) -> str:
    return "".join(text for name, text in runs if name in names)


def test_without_markers_all_that_is_written_stays_or_comes(tiny: Tiny) -> None:
    call, answer, _, plain, calling = groups(tiny, **NONE)
    # The token before an output decides how it begins, and belongs to it.
    assert joined(call, "markers", "thinking") == f"<|assistant|>{CALL}"
    assert joined(answer, "markers", "thinking") == "<|assistant|>There are 14 days."
    assert joined(answer, "responses") == f"{CALL}<|end|><|tool|>"  # up to the next message
    assert joined(plain, "answers") == f"<|assistant|>{THOUGHT}one, two, three."
    assert joined(calling, "answers") == f"<|assistant|>{THOUGHT}{CALL}"
    assert all(name in ("prompts", "answers") for name, _ in [*plain, *calling])
    assert call[0] == ("prompts", joined(call, "prompts"))


def test_with_tags_calls_stay_in_both_sets(tiny: Tiny) -> None:
    call, answer, _, plain, calling = groups(tiny, **TAGS)
    assert joined(call, "markers", "thinking") == f"<|assistant|>{CALL}"
    assert joined(answer, "markers", "thinking").endswith("<|assistant|>There are 14 days.")
    assert joined(plain, "answers") == f"<|assistant|>{THOUGHT}one, two, three."
    # The token before the call decides that it begins: it is the agent's.
    taught = joined(calling, "answers")
    assert f"<|assistant|>{THOUGHT}".startswith(taught)
    assert joined(calling, "answers", "markers", "thinking") == f"<|assistant|>{THOUGHT}{CALL}"
    assert CALL in joined(calling, "markers", "thinking")


def test_blocks_are_required_unless_they_are_optional(tiny: Tiny) -> None:
    config = read_config(written(tiny, "required", **{**TAGS, "blocks": "required"}))
    samples = load_samples(config.settings, open_trio(config, LoadOptions()))
    assert samples.instruction is not None
    for data in (samples.reasoning, samples.instruction):
        (skipped,) = data.skipped
        assert skipped[1] == "no '<tool_call>' after the prompt"
        assert len(data.samples) == data.total - 1


@pytest.mark.parametrize("name", ["none", "tags"])
def test_it_is_calibrated_and_merged(tiny: Tiny, tmp_path: Path, name: str) -> None:
    settings = NONE if name == "none" else TAGS
    path = written(tiny, name, **settings)
    outcome = run("calibrate", str(path), "--quiet")
    assert outcome.code == 0, outcome.output
    merged = merging.merge_process(tmp_path, content(tiny, name, **settings)).weights()
    file = tiny.folder / f"{name}.rain.safetensors"
    header, stored = CalibrationFile.open(file).header, load_file(file)
    pairs = [] if name == "none" else [["<tool_call>", "</tool_call>"]]
    assert header["data"]["markers"] == pairs
    assert header["tensors"]
    tuned = tiny.weights("instruct")
    for key, weight in tiny.weights("reasoning").items():
        entry = header["tensors"].get(key)
        change = torch.zeros(())
        if entry is not None:
            change = stored[entry["a"]] @ stored[entry["b"]].mT
            change += entry.get("start", 0.0) * (tuned[key] - weight)
        assert torch.allclose(merged[key], weight + change, rtol=1e-5, atol=1e-6)
        assert entry is None or bool(change.any())


def test_the_projection_protects_outputs_too(tiny: Tiny) -> None:
    spans = {"projection": "orthogonal", "rank_by": "full", "max_rank": 40}
    found = content(tiny, "projection", **NONE, fit="projection", gamma=1.0, **spans)
    path = tiny.folder / "projection.yml"
    path.write_text(yaml.safe_dump(found))
    assert run("calibrate", str(path), "--quiet").code == 0
    header = CalibrationFile.open(tiny.folder / "projection.rain.safetensors").header
    assert header["sites"]
    assert header["data"]["reasoning"]["used"] == 3


def test_verify_measures_on_what_stays(tiny: Tiny, tmp_path: Path) -> None:
    path = written(tiny, "verified", **NONE)
    out = tmp_path / "merged"
    assert run("merge", str(path), str(out), "--quiet").code == 0
    outcome = run(
        "verify",
        str(out),
        "--reasoning-data",
        str(tiny.folder / "stays.jsonl"),
        "--json",
        "--quiet",
    )
    assert outcome.code in (0, 3), outcome.output  # random models may be far apart
    found = json.loads(outcome.stdout)["divergence"]["drift"]
    assert found["samples"] == 3
    assert found["think"]["positions"] > 0
    assert found["content"]["positions"] > 0


def test_an_output_without_a_call_is_no_sample_of_thinking_apart(tiny: Tiny) -> None:
    lines = [json.dumps({"prompt": "Is 51 prime?", "reasoning": "No.", "response": "No."}) + "\n"]
    (tiny.folder / "apart.jsonl").write_text("".join(lines))
    path = written(tiny, "apart", **NONE, reasoning_data=str(tiny.folder / "apart.jsonl"))
    outcome = run("calibrate", str(path))
    assert outcome.code == 1
    assert "without markers it must be given as 'output', verbatim" in outcome.output
