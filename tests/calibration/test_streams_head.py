"""The output head in stream matching: against dense logits in float64, and through the merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merging import merge
from test_streams_exact import WHOLE, Reference, agree, changes, write_many
from tiny import Tiny
from torch import Tensor

from rain_mergekit.calibration import stream_engine, stream_head
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.errors import RainError
from rain_mergekit.text.calibration_sets import load_instruction

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
WORDS = 330  # of the tokenizer; the models have 400 rows


class HeadReference(Reference):
    """After the layers, the head: logits of whole models, every row of all words."""

    def fit(self) -> dict[str, Tensor]:
        found = super().fit()
        now = self.run(self.merged, self.own, [text.ids for text in self.texts])
        x = torch.cat([inputs["lm_head"] for inputs, _ in now])
        error = self.targets("lm_head") - torch.cat([outputs["lm_head"] for _, outputs in now])
        error[:, WORDS:] = 0
        return {**found, "lm_head": self._ridge("lm_head", x, error)}


@pytest.mark.parametrize(("choosing", "margin"), [(False, None), (True, None), (False, 0.1)])
def test_the_head_is_fitted_to_the_teachers_logits(
    tmp_path: Path, choosing: bool, margin: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_head, "BLOCK_ROWS", 64)  # several blocks, the last one not whole
    settings = {**WHOLE, "lm_head": "all", "teacher_margin": margin}
    if choosing:
        del settings["stream_epsilon"]
    tiny = Tiny.make(tmp_path, "llama").with_head(HEAD).using(**settings)
    if choosing:
        write_many(tmp_path)
    reference = HeadReference(tiny, choosing=choosing)
    agree(tiny, reference)
    assert float(changes(tiny)["lm_head"].norm()) > 0.1


def test_the_head_of_the_instruct_model_teaches_the_instructions_too(tmp_path: Path) -> None:
    settings = {**WHOLE, "lm_head": "all", "teach_instructions": True}
    tiny = Tiny.make(tmp_path, "llama").with_head(HEAD).using(**settings)
    agree(tiny, HeadReference(tiny))


def test_an_instruct_model_with_fewer_rows_leaves_the_others(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "llama").with_head(HEAD).using(**WHOLE, lm_head="all")
    tiny.calibrate()
    file = CalibrationFile.open(tiny.path)
    factors = file.change(file.tensors[HEAD])
    assert factors is not None
    assert not factors[0][WORDS:].any()
    assert factors[0][:WORDS].any(1).sum() > WORDS / 2


def test_mergekit_writes_the_head_and_leaves_the_embedding(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "llama").with_head(HEAD).using(fit="streams", lm_head="all")
    tiny.calibrate()
    outcome = merge(tmp_path / "merge", tiny.content())
    assert outcome.code == 0, outcome.output
    merged, own = outcome.weights(), tiny.weights("reasoning")
    change = changes(tiny)["lm_head"]
    assert torch.allclose(merged[HEAD].double(), own[HEAD].double() + change, atol=1e-6)
    assert torch.equal(merged[EMBEDDING], own[EMBEDDING])


def test_a_tied_head_changes_words_of_the_answers_alone(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "qwen2").with_head(EMBEDDING)
    with pytest.raises(RainError, match="are one tensor"):
        tiny.using(fit="streams", lm_head="all").calibrate()
    tiny = tiny.using(fit="streams", lm_head="unseen")
    tiny.calibrate()
    outcome = merge(tmp_path / "merge", tiny.content())
    assert outcome.code == 0, outcome.output
    merged, own = outcome.weights(), tiny.weights("reasoning")
    changed = (merged[EMBEDDING] != own[EMBEDDING]).any(1).nonzero().flatten().tolist()
    samples = load_instruction(str(tmp_path / "instruction.jsonl"), tiny.tokenizer()).samples
    said = {one.input_ids[i] for one in samples for i in one.response_positions}
    assert changed
    assert set(changed) <= said


def test_an_interruption_after_the_layers_repeats_the_head_alone(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stopping(*_: Any) -> None:
        raise Stop

    tiny = Tiny.make(tmp_path, "llama").with_head(HEAD).using(fit="streams", lm_head="all")
    tiny.calibrate()
    whole = tiny.path.read_bytes()
    tiny.path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_engine, "write_stream_head", stopping)
        with pytest.raises(Stop):
            tiny.calibrate(snapshot_seconds=0.0)
    assert tiny.calibrate(snapshot_seconds=0.0).first_layer == 2
    assert tiny.path.read_bytes() == whole
