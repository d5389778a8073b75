"""The map to the vocabulary as one more weight of the merge (`lm_head`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import Outcome, merge, merge_process
from safetensors.torch import load_file, save_file
from tiny import Dense, Tiny, unaccepted
from torch import Tensor
from transformers import AutoModelForCausalLM

from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import plan
from rain_mergekit.calibration.up_to_date import compare
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.writer import write_calibration
from rain_mergekit.errors import RainError
from rain_mergekit.evaluation.layerwise_drift import VerifyOptions
from rain_mergekit.evaluation.task_vectors import measure_task_vectors as task_vectors
from rain_mergekit.evaluation.texts import Texts, read_texts
from rain_mergekit.evaluation.verify import measure_merge
from rain_mergekit.evaluation.weight_change import relative_weight_change
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.loading import LoadOptions, open_checkpoint

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# few rows: 15 think positions, so that the full rank stays below the width
FULL = {"rank_by": "full", "protect_thinking": 0.0, "window": 1}
WORDS = 330  # of the tokenizer; the models have 400 rows

Change = Callable[[dict[str, Tensor]], object]


def change_weights(folder: Path, change: Change) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture(scope="module", name="untied")
def _untied(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny.make(tmp_path_factory.mktemp("untied"), "llama", torch.bfloat16).with_head(HEAD)


@pytest.fixture(scope="module", name="tied")
def _tied(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny.make(tmp_path_factory.mktemp("tied"), "qwen2").with_head(EMBEDDING)


def copied(tiny: Tiny, folder: Path, **settings: Any) -> Tiny:
    """The same trio in a folder whose files may be changed."""
    shutil.copytree(tiny.folder, folder)
    return Tiny(folder, settings)


def recorded(tiny: Tiny) -> tuple[CalibrationFile, Tensor]:
    """The file, and which of the head's rows are merged."""
    file = CalibrationFile.open(tiny.path)
    (key,) = {plan.rows for plan in file.tensors.values() if plan.tokens}
    rows = file.scale(key)
    assert rows is not None
    return file, rows.double()


def expected(tiny: Tiny, name: str, rows: Tensor) -> Tensor:
    """rows * Delta (I - U V^T), dense and float64, with U and V from the definition."""
    dense = Dense(tiny)
    delta = rows[:, None] * dense.delta(name)
    return delta @ dense.head(delta).keep


def logits(tiny: Tiny, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """At think positions of the reasoning set, and at responses of the instruction set."""
    model, dense = tiny.model(), Dense(tiny)
    model.load_state_dict({n: w.double() for n, w in weights.items()}, strict=False)
    found = []
    for samples, place in ((dense.reasoning, "think"), (dense.instruction, "response")):
        with torch.no_grad():
            parts = [
                model(torch.tensor([s.input_ids])).logits[0, list(getattr(s, f"{place}_positions"))]
                for s in samples
            ]
        found.append(torch.cat(parts))
    return found[0], found[1]


def test_all_rows_of_an_own_head_in_a_process_of_its_own(untied: Tiny, tmp_path: Path) -> None:
    """bfloat16 models; dtype float32, so that nothing is rounded in the result."""
    tiny = untied.using(lm_head="all", **FULL)
    tiny.calibrate()
    outcome = merge_process(tmp_path / "run", tiny.content(dtype="float32", rain=None))
    merged, base = outcome.weights(), tiny.weights("reasoning")
    _, rows = recorded(tiny)
    assert torch.equal(rows, (torch.arange(400) < WORDS).double())  # padding is nobody's
    change = merged[HEAD].double() - base[HEAD].double()
    wanted = expected(tiny, HEAD, rows)
    assert float((change - wanted).norm()) < 1e-4 * float(wanted.norm())
    assert torch.equal(merged[EMBEDDING], base[EMBEDDING].float())
    loaded = AutoModelForCausalLM.from_pretrained(outcome.folder)
    assert torch.equal(loaded.get_output_embeddings().weight, merged[HEAD])
    # with all before it unchanged, the next token is what it was where it is protected
    before, after = logits(tiny, {}), logits(tiny, {HEAD: merged[HEAD]})
    task = logits(tiny, {HEAD: base[HEAD].double() + rows[:, None] * Dense(tiny).delta(HEAD)})
    moved_by = [float((a - b).norm()) for a, b in zip(after, before, strict=True)]
    unprotected = [float((a - b).norm()) for a, b in zip(task, before, strict=True)]
    assert moved_by[0] < 1e-4 * unprotected[0]
    assert moved_by[1] > 0.1 * unprotected[1]


def test_a_head_that_is_the_embedding_is_refused(tied: Tiny) -> None:
    with pytest.raises(
        RainError, match=f"its output head and its embedding are one tensor .{EMBEDDING}."
    ):
        tied.using(lm_head="all").calibrate()


@pytest.mark.parametrize("both", [False, True])
def test_rows_of_unseen_tokens_of_an_embedding(tied: Tiny, tmp_path: Path, *, both: bool) -> None:
    """`both`: the checkpoint holds the shared weight twice."""
    tiny = copied(tied, tmp_path / "trio", lm_head="unseen", rank_share=0.9)
    if both:
        for role in ("reasoning", "instruct", "pretrained"):
            change_weights(tiny.folder / role, lambda w: w.update({HEAD: w[EMBEDDING].clone()}))
    tiny.calibrate()
    merged = merge(tmp_path / "run", tiny.content(rain=None)).weights()
    _, rows = recorded(tiny)
    dense = Dense(tiny)
    seen = {token for sample in dense.reasoning for token in sample.input_ids}
    written = {s.input_ids[i] for s in dense.instruction for i in s.response_positions}
    added = set(tiny.tokenizer().get_added_vocab().values())
    assert set(rows.nonzero().flatten().tolist()) == written - seen - added
    base = tiny.weights("reasoning")[EMBEDDING]
    wanted = expected(tiny, EMBEDDING, rows)
    change = merged[EMBEDDING].double() - base.double()
    assert float((change - wanted).norm()) < 1e-4 * float(wanted.norm()) > 0
    assert torch.equal(merged[EMBEDDING][rows == 0], base[rows == 0])
    assert (HEAD in merged) is both
    assert not both or torch.equal(merged[HEAD], merged[EMBEDDING])


def test_what_the_reasoning_set_reads_stays(tied: Tiny, tmp_path: Path) -> None:
    """The embedding changes, and the hidden states of the reasoning set do not."""
    tiny = tied.using(lm_head="unseen", **FULL)
    tiny.calibrate()
    merged = merge(tmp_path / "run", tiny.content(rain=None)).weights()
    before, after = logits(tiny, {}), logits(tiny, {EMBEDDING: merged[EMBEDDING]})
    scale = float((merged[EMBEDDING] - tiny.weights("reasoning")[EMBEDDING]).norm())
    assert float((after[0] - before[0]).norm()) < 1e-4 * scale
    assert float((after[1] - before[1]).norm()) > 1e-2 * scale


def test_coefficients_leave_the_head_alone(untied: Tiny) -> None:
    tiny = untied.using(lm_head="all", coefficients="normalized", alpha_min=0.0)
    summary = tiny.calibrate()
    assert unaccepted(summary.warnings) == []
    assert (summary.layers, summary.layer_passes["reasoning"]) == (2, 3 * 2)
    file, rows = recorded(tiny)
    assert set(rows.tolist()) == {0.0, 1.0}
    assert file.tensors[HEAD].cols is None
    assert len(file.header["layers"]) == 2


def test_the_plan_counts_the_head(untied: Tiny) -> None:
    estimates = [
        plan(untied.using(lm_head=choice).config(), RunOptions()) for choice in ("off", "all")
    ]
    less, more = estimates
    # at most 15 x 3 rows are protected; U and V, and one number for each token
    assert 400 * 4 < more.file_bytes - less.file_bytes <= 400 * 4 + 2 * 48 * 48 * 4
    assert more.statistics_flops > less.statistics_flops
    assert more.memory["layer"] >= less.memory["layer"] > 0


# --- vocabularies that are not alike -----------------------------------------------------------


def aligned(tiny: Tiny, folder: Path, source: str = "base") -> Outcome:
    return merge(folder, tiny.content(rain=None, tokenizer={"source": source}))


@pytest.mark.parametrize("extra", [0, 8])
def test_mergekit_aligns_the_tokens(untied: Tiny, tmp_path: Path, extra: int) -> None:
    """Padding goes; the instruct model may have had more of it."""
    tiny = copied(untied, tmp_path / "trio", lm_head="all", accept=["no_thinking"])
    if extra:
        more = torch.randn(extra, 48).to(torch.bfloat16)

        def widen(weights: dict[str, Tensor]) -> None:
            for name in (HEAD, EMBEDDING):
                weights[name] = torch.cat([weights[name], more])

        change_weights(tiny.folder / "instruct", widen)
        path = tiny.folder / "instruct" / "config.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "vocab_size": 400 + extra}))
    tiny.calibrate()
    merged = aligned(tiny, tmp_path / "run").weights()
    plain = copied(untied, tmp_path / "plain", lm_head="all")
    plain.calibrate()
    wanted = merge(tmp_path / "other", plain.content(rain=None)).weights()
    assert merged[HEAD].shape == (WORDS, 48)
    assert torch.equal(merged[HEAD], wanted[HEAD][:WORDS])


def test_tokens_in_another_order_are_refused(untied: Tiny, tmp_path: Path) -> None:
    tiny = untied.using(lm_head="all")
    tiny.calibrate()
    other = tmp_path / "tokenizer"
    shutil.copytree(tiny.folder / "reasoning", other)
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    first, second = (next(w for w, i in words.items() if i == number) for number in (50, 51))
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(content))
    message = aligned(tiny, tmp_path / "run", str(other)).error()
    assert f"{HEAD}: its rows are in another order" in message
    assert "tokenizer: {source: base}" in message


def test_the_others_have_no_head_of_their_own(untied: Tiny, tmp_path: Path) -> None:
    """As of some distilled models: the embedding of the others is their head."""
    tiny = copied(untied, tmp_path / "trio", lm_head="all")
    noise = torch.randn(400, 48).to(torch.bfloat16)
    for role in ("instruct", "pretrained"):
        folder = tiny.folder / role
        change_weights(folder, lambda weights: weights.pop(HEAD))
        content = json.loads((folder / "config.json").read_text())
        content["tie_word_embeddings"] = True
        (folder / "config.json").write_text(json.dumps(content))
    change_weights(tiny.folder / "instruct", lambda weights: weights[EMBEDDING].add_(noise))
    tiny.calibrate()
    merged = merge(tmp_path / "run", tiny.content(dtype="float32", rain=None)).weights()
    _, rows = recorded(tiny)
    dense = Dense(tiny)
    delta = rows[:, None] * dense.delta(EMBEDDING)
    wanted = delta @ dense.head(delta).keep
    change = merged[HEAD].double() - tiny.weights("reasoning")[HEAD].double()
    assert float((change - wanted).norm()) < 1e-4 * float(wanted.norm())


def test_a_number_that_is_two_tokens_stays(untied: Tiny, tmp_path: Path) -> None:
    """The models' added tokens often differ while their numbers do not."""
    tiny = copied(untied, tmp_path / "trio", lm_head="all")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = tiny.folder / "instruct" / name
        path.write_text(path.read_text().replace("<|end|>", "<|stop|>"))
    tiny.calibrate()
    _, rows = recorded(tiny)
    assert (rows[:WORDS] == 0).nonzero().flatten().tolist() == [3]


# --- what cannot be merged ---------------------------------------------------------------------


def quantise(weights: dict[str, Tensor]) -> None:
    weights[HEAD] = weights[HEAD].to(torch.int8)


def narrow(weights: dict[str, Tensor]) -> None:
    weights[HEAD] = weights[HEAD][:, :40].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [(quantise, "is stored as torch.int8"), (narrow, r"is \[400, 40\], expected one row for each")],
)
def test_heads_that_are_no_plain_weights(
    untied: Tiny, tmp_path: Path, change: Change, message: str
) -> None:
    tiny = copied(untied, tmp_path / "trio", lm_head="all", accept=["no_thinking"])
    change_weights(tiny.folder / "instruct", change)
    with pytest.raises(RainError, match=message):
        tiny.calibrate()


def test_no_row_is_left(tied: Tiny, tmp_path: Path) -> None:
    """All that the responses write the reasoning set has too."""
    tiny = copied(tied, tmp_path / "trio", lm_head="unseen")
    lines = (tiny.folder / "instruction.jsonl").read_text().splitlines()
    with (tiny.folder / "reasoning.jsonl").open("a") as file:
        for sample in map(json.loads, lines):
            entry = {"prompt": sample["prompt"], "reasoning": "a", "response": sample["response"]}
            file.write(json.dumps(entry) + "\n")
    with pytest.raises(RainError, match="lm_head: unseen leaves no row to merge"):
        tiny.calibrate()


# --- what comes after --------------------------------------------------------------------------


def test_a_file_from_before_the_setting_is_as_good_as_off(untied: Tiny) -> None:
    tiny = untied.using()
    tiny.calibrate()
    header = CalibrationFile.open(tiny.path).header
    assert header["settings"].pop("lm_head") == "off"
    write_calibration(tiny.path, header, load_file(tiny.path))
    assert compare(tiny.config(), LoadOptions()).current
    other = compare(tiny.using(lm_head="all").config(), LoadOptions())
    (difference,) = other.differences
    assert difference == (
        'rain.lm_head is "all", and the file was written before this setting existed'
    )


@pytest.mark.parametrize(("trio", "choice"), [("untied", "all"), ("tied", "unseen")])
def test_rounding_of_the_head(
    trio: str, choice: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The merge before rounding, layer by layer, is the merge that is stored in float32."""
    tiny: Tiny = request.getfixturevalue(trio).using(lm_head=choice)
    tiny.calibrate()
    names = {"rounded": "bfloat16", "whole": "float32"}
    folders = {
        name: merge(tmp_path / name, tiny.content(dtype="float32", out_dtype=dtype)).folder
        for name, dtype in names.items()
    }
    reasoning = open_checkpoint(str(tiny.folder / "reasoning"), LoadOptions())
    samples, _ = read_texts(reasoning, Texts(str(tiny.folder / "instruction.jsonl"), None))
    found = {
        name: measure_merge(reasoning, opened(folder), samples, VerifyOptions(LoadOptions()))
        for name, folder in folders.items()
    }
    assert found["rounded"].unknown is None
    for place in ("think", "content", "rest"):
        unrounded = getattr(found["rounded"].unrounded, place).mean
        whole = getattr(found["whole"].drift, place).mean
        assert unrounded == pytest.approx(whole, rel=1e-3, abs=1e-9)
        assert whole > 0


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder), LoadOptions())


def test_reports_show_the_head_after_the_last_layer(untied: Tiny, tmp_path: Path) -> None:
    tiny = untied.using(lm_head="all")
    tiny.calibrate()
    folder = merge(tmp_path / "run", tiny.content(rain=None)).folder
    file = CalibrationFile.open(tiny.path)
    models = {role: opened(tiny.folder / role) for role in ("reasoning", "instruct", "pretrained")}
    found = relative_weight_change(file, models["reasoning"], opened(folder))["lm_head"]
    old = tiny.weights("reasoning")[HEAD].double()
    new = load_file(folder / "model.safetensors")[HEAD].double()
    assert found == {2: pytest.approx(float((new - old).norm() / old.norm()), rel=1e-5)}
    vectors = task_vectors(file, models, rank=2)
    assert any(line.startswith(f"Of {HEAD}, with a row for each token") for line in vectors.remarks)
    assert not [change for change in vectors.changes if change.module == "lm_head"]
