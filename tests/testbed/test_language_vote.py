"""RCP-Merging's vote against its formulas, its controls, and what the page says of it."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from doc_blocks import ROOT
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from rain_mergekit.system.shipped_files import TRIO
from testbed.judging.intervals import packed
from testbed.language import vote, vote_page
from testbed.language.making import merged
from testbed.language.recipes import slug
from testbed.language.sets import prompt_record
from testbed.language.tasks import draw_task
from testbed.language.voting import (
    EVEN,
    FACTS,
    RANDOM,
    REST,
    VOTE,
    Texts,
    Voting,
    comparisons,
)
from testbed.models.loading import load_model, load_tokenizer, render
from testbed.puzzles.records import Record, read_lines

Array = npt.NDArray[np.float64]
FEW = Texts(plain=3, constrained=0, instruction=5)


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vote") / "trio"
    shutil.copytree(TRIO, folder)
    shutil.copy(folder / "reasoning.jsonl", folder / "plain.jsonl")
    (folder / "constrained.jsonl").write_text("")
    return folder


@pytest.fixture(scope="module")
def voting(trio: Path) -> Voting:
    found = Voting(trio, FEW)
    found.facts()
    return found


def decided(
    weights: tuple[Array, Array], own: list[Array], asked: list[Array], penalty: float
) -> npt.NDArray[np.bool_]:
    """Which elements are taken, from gradients: the published code's formulas in float64."""
    reasoning, instruct = weights
    prior = np.mean([(g * reasoning) ** 2 for g in own], axis=0)
    against = penalty * prior * (reasoning - instruct) ** 2
    votes = sum(np.where(g * instruct + against <= 0, 1, -1) for g in asked)
    return np.asarray(votes > 0)


@pytest.mark.parametrize("penalty", [0.0, 10.0, 1000.0])
def test_the_formulas_in_numbers(penalty: float) -> None:
    """Worked by hand: with the published penalty nothing of these four elements is taken."""
    weights = np.array([[1, 2], [-1, 0.5]]), np.array([[1.1, 1.8], [-1.2, 0.5]])
    own = [np.array([[0.1, 0.2], [0.3, 0]]), np.array([[0.3, -0.2], [0.1, 0]])]
    asked = [
        np.array([[-0.2, 0.1], [0.4, 0.3]]),
        np.array([[-0.1, -0.3], [-0.02, 0.3]]),
        np.array([[0.05, -0.3], [0.2, -0.1]]),
    ]
    expected = (
        [[False, False], [False, False]] if penalty == 1000 else [[True, True], [True, False]]
    )
    assert decided(weights, own, asked, penalty).tolist() == expected


def gradients(model: PreTrainedModel, folder: Path, record: Record, kept: str) -> dict[str, Array]:
    """Of the mean loss over the tokens of `kept`, with which the text ends, and of the last one."""
    tokenizer = load_tokenizer(folder)
    given = render(tokenizer, record["prompt"]) + record["output"].removesuffix(kept)
    head, said = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (given, kept))
    ids = torch.tensor([[*head, *said, tokenizer.eos_token_id]])
    chances = log_softmax(model(ids).logits[0], dim=-1)
    wanted = [-chances[i - 1, ids[0, i]] for i in range(len(head), ids.shape[1])]
    model.zero_grad()
    torch.stack(wanted).mean().backward()
    return {n: w.grad.numpy().copy() for n, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("penalty", [1000.0, 1e9])
def test_the_vote_is_that_of_its_formulas(trio: Path, penalty: float) -> None:
    reasoning, instruct = (load_model(trio / role).double() for role in ("reasoning", "instruct"))
    own = read_lines(trio / "plain.jsonl")[:3]
    follow = read_lines(trio / "instruction.jsonl")[:5]
    tokenizer = load_tokenizer(trio / "reasoning")
    prior = vote.prior(reasoning, [vote.whole(tokenizer, record) for record in own])
    unit = vote.distances(prior, reasoning, instruct)
    texts = [vote.answer(load_tokenizer(trio / "instruct"), record) for record in follow]
    (tally,) = vote.tallied(instruct, texts, unit, [penalty])

    priors = [gradients(reasoning, trio / "reasoning", r, r["output"]) for r in own]
    answers = [r["output"].partition("</think>\n\n")[2] for r in follow]
    asked = [
        gradients(instruct, trio / "instruct", r, said)
        for r, said in zip(follow, answers, strict=True)
    ]
    named = dict(instruct.named_parameters())
    taken = 0
    for name, weight in reasoning.named_parameters():
        weights = weight.detach().numpy(), named[name].detach().numpy()
        ours = tally.mask[name].numpy()
        theirs = decided(weights, [g[name] for g in priors], [g[name] for g in asked], penalty)
        # where S is zero to the last bits, both ways of summing may differ
        assert (ours == theirs).mean() > 0.9995
        taken += int(theirs.sum())
    assert 0.01 < taken / sum(w.numel() for w in named.values()) < 0.99


def test_an_even_penalty_makes_prior_and_sensitivity_alike(trio: Path) -> None:
    model = load_model(trio / "instruct")
    tokenizer = load_tokenizer(trio / "instruct")
    texts = [vote.answer(tokenizer, r) for r in read_lines(trio / "instruction.jsonl")[:1]]
    found = dict(vote.first_order(model, texts[0]))
    sizes = torch.cat([f.flatten()[:: vote.SPARSE].abs() for f in found.values()])
    unit = {name: torch.full_like(tensor, 0.5) for name, tensor in found.items()}
    assert vote.even_penalty(model, texts, unit) == pytest.approx(float(sizes.median()) / 0.5)


def test_the_controls_are_as_dense_in_each_tensor(trio: Path, voting: Voting) -> None:
    def taken(name: str) -> dict[str, torch.Tensor]:
        folder = trio / voting.name / slug(name)
        made = load_model(folder).state_dict()
        changed = {n: instruct[n] != pretrained[n] for n in made}
        for n, weight in made.items():
            assert torch.equal(weight[~changed[n]], pretrained[n][~changed[n]])
            assert ((weight == instruct[n]) | (weight == pretrained[n])).all()
        return {n: (made[n] == instruct[n]) & changed[n] for n in made}

    instruct, pretrained = (
        load_model(trio / role).state_dict() for role in ("instruct", "pretrained")
    )
    chosen, rest, chance, other = (
        taken(name) for name in (VOTE, REST, f"{RANDOM} 0", f"{RANDOM} 1")
    )
    facts = voting.facts()
    assert facts["density"][VOTE] == facts["density"][f"{RANDOM} 0"]
    assert facts["density"][VOTE] + facts["density"][REST] == pytest.approx(1)
    assert facts["density"][EVEN] < facts["density"][VOTE]
    for name, mask in chosen.items():
        assert torch.equal(mask | rest[name], instruct[name] != pretrained[name])
        assert not (mask & rest[name]).any()
        assert not torch.equal(chance[name], other[name]) or mask.numel() < 500


def test_a_random_mask_takes_as_many_of_each_tensor() -> None:
    dice = torch.Generator().manual_seed(3)
    mask = {
        name: torch.rand(shape, generator=dice) < share
        for name, shape, share in (("a", (40, 30), 0.2), ("b", (50,), 0.9), ("c", (7,), 0.0))
    }
    made = [vote.at_random(mask, seed) for seed in (0, 0, 1)]
    for name, taken in mask.items():
        assert [int(one[name].sum()) for one in made] == [int(taken.sum())] * 3
        assert torch.equal(made[0][name], made[1][name])
    assert not torch.equal(made[0]["a"], made[2]["a"])
    assert not torch.equal(made[0]["a"], mask["a"])


def test_a_row_adds_the_masked_part_of_the_change(
    trio: Path, voting: Voting, tmp_path: Path
) -> None:
    (row,) = (row for row in voting.rows() if row.name == VOTE)
    merge = load_model(merged(row.recipe(trio, 0.8), tmp_path / "merged")).state_dict()
    part = load_model(trio / voting.name / slug(VOTE)).state_dict()
    pretrained, reasoning = (
        load_model(trio / role).state_dict() for role in ("pretrained", "reasoning")
    )
    for name, weight in merge.items():
        expected = (reasoning[name].double() + 0.8 * (part[name] - pretrained[name])).bfloat16()
        torch.testing.assert_close(weight, expected.float(), rtol=0.008, atol=1e-6)


def test_differences_are_of_the_same_prompts() -> None:
    rng = random.Random(4)  # noqa: S311 - nothing secret is drawn
    records = [prompt_record(draw_task(rng, "test", int(n < 40))) for n in range(60)]
    right = [n % 2 == 0 for n in range(60)]
    asked = [n % 2 == 0 and n < 40 for n in range(60)]
    all_bits = {"right": packed(right), "both": packed(asked), "whole": packed([True] * 60)}
    none = packed([False] * 60)
    rows = {
        VOTE: {"bits": all_bits},
        f"{RANDOM} 0": {"bits": {"right": packed(right), "both": none, "whole": none}},
    }
    (found,) = comparisons(records, rows)
    assert (found["first"], found["second"]) == (VOTE, f"{RANDOM} 0")
    assert found["difference"]["plain_right"] == (0, 0, 0)
    for name in ("both", "all_three"):
        value, low, high = found["difference"][name]
        assert value == 0.5
        assert 0.3 < low < 0.45
        assert 0.55 < high < 0.7


@pytest.mark.parametrize(
    ("lows", "begins"), [((0.1, 0.2), "**To be built"), ((0.1, -0.1), "**Not built")]
)
def test_the_decision_is_that_of_the_intervals(lows: tuple[float, float], begins: str) -> None:
    against = [
        {"first": VOTE, "second": f"{RANDOM} {n}", "difference": {"both": [low + 0.1, low, 0.5]}}
        for n, low in enumerate(lows)
    ]
    assert vote_page.verdict({"comparisons": against}).startswith(begins)


def test_the_page_says_what_its_rows_say() -> None:
    results = ROOT / "testbed" / "results" / "language"
    text = vote_page.PAGE.read_text(encoding="utf-8")
    assert vote_page.written(text, results) == text
    facts = json.loads((results / vote_page.ROWS / FACTS).read_text(encoding="utf-8"))
    assert f"{facts['texts']['instruction']} instruction" in text
