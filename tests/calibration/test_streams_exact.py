"""Stream matching of whole models against a dense float64 computation that streams nothing.

The reference runs transformers' whole models once for every site of every layer, takes inputs and
outputs by hooks on nn.Linear, and solves the normal equations as they stand.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from safetensors.torch import save_file
from stored_changes import products
from tiny import FAMILIES, INSTRUCTION, REASONING, SITES, TEMPLATE, Tiny, read_weights
from torch import Tensor, nn

from rain_mergekit.calibration import site_sums
from rain_mergekit.calibration.fit_rule import LANDMARKS, MATRICES, directions_within
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.linalg.ridge_fit import CANDIDATES
from rain_mergekit.text.calibration_sets import load_instruction, load_reasoning

WEIGHTS = {"prompts": 0.5, "markers": 1.0, "thinking": 1.0, "answers": 1.0, "responses": 0.5}
EPSILON = 0.01
UNTAUGHT = "untaught"
# The module whose input is the residual stream after attention, where it is another one.
AFTER_ATTENTION = {
    "gemma2": "pre_feedforward_layernorm",
    "gemma3_text": "pre_feedforward_layernorm",
    "olmo2": "mlp",
}
WHOLE = {"fit": "streams", "stream_rank_share": 1.0, "max_rank": 1000, "stream_epsilon": EPSILON}


@dataclass(frozen=True)
class Text:
    """Token ids, and the group of each token."""

    ids: tuple[int, ...]
    groups: tuple[str, ...]
    asked: tuple[int, ...] = ()  # instructions in the prompt, where the instruct model teaches them

    @property
    def answers(self) -> Tensor:
        return torch.tensor([group == "answers" for group in self.groups])


def read_texts(tiny: Tiny) -> list[Text]:
    """Both sets by the definition: text after text, token after token."""
    tokenizer, settings = tiny.tokenizer(), tiny.config().settings
    texts = []
    asked, own = (
        [json.loads(line)["prompt"] for line in (tiny.folder / name).read_text().splitlines()]
        for name in ("instruction.jsonl", "reasoning.jsonl")
    )
    samples = load_reasoning(settings.reasoning_data, tokenizer, keep_response=True).samples
    taught = settings.teach_instructions
    for prompt, sample in zip(own, samples, strict=True):
        groups = ["prompts"] * len(sample.input_ids)
        for name, positions in (
            (UNTAUGHT if prompt in asked else "responses", sample.response_positions),
            ("thinking", sample.content_positions),
            ("markers", sample.think_positions),
        ):
            for position in positions:
                groups[position] = name
        if taught and prompt in asked:  # the other text stands for this prompt
            groups = [UNTAUGHT if group == "prompts" else group for group in groups]
        texts.append(Text(sample.input_ids, tuple(groups)))
    for other in load_instruction(str(settings.instruction_data), tokenizer).samples:
        groups = ["prompts"] * len(other.input_ids)
        for position in other.thinking_positions:
            groups[position] = "thinking"
        for position in other.think_positions:
            groups[position] = "markers"
        end = max(other.think_positions) + 1
        written = [
            i for i in other.response_positions if tokenizer.decode([other.input_ids[i]]).strip()
        ]
        first = min(written) - 1  # the token that predicts the answer's first one
        for position in range(end, len(groups)):
            groups[position] = "markers"
        for position in range(first, len(groups)):
            groups[position] = "answers"
        spans = {i for span in other.spans for i in span.prompt} if taught else ()
        texts.append(Text(other.input_ids, tuple(groups), tuple(sorted(spans))))
    return texts


class Hooks:
    """Inputs and outputs of every nn.Linear, and the residual stream after attention and MLP."""

    def __init__(self, model: Any) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.routes: dict[str, tuple[Tensor, Tensor]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self._linear(name))
            if name.endswith(".experts"):
                module.register_forward_pre_hook(self._experts(name))
        for index, layer in enumerate(model.model.layers):
            prefix = f"model.layers.{index}."
            after_attention = AFTER_ATTENTION.get(
                model.config.model_type, "post_attention_layernorm"
            )
            layer.get_submodule(after_attention).register_forward_pre_hook(
                lambda _, args, p=prefix: self.outputs.update({f"{p}after attention": args[0][0]})
            )
            layer.register_forward_hook(
                lambda _, __, out, p=prefix: self.outputs.update(
                    {f"{p}after mlp": (out[0] if isinstance(out, tuple) else out)[0]}
                )
            )

    def _linear(self, name: str) -> Any:
        def keep(_: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[name], self.outputs[name] = args[0][0], output[0]

        return keep

    def _experts(self, name: str) -> Any:
        """What routed experts see, which of them each token goes to, and with which weights."""

        def keep(_: Any, args: tuple[Tensor, ...]) -> None:
            self.inputs[name], self.routes[name] = args[0], (args[1], args[2])

        return keep


class Reference:
    """All texts through whole models in float64.

    readings: what the instruct model reads in place of each text, and by how much its output
    enters the target at the answers (`keeps` of what was there before it, `share` of its own).
    """

    def __init__(
        self,
        tiny: Tiny,
        readings: Sequence[tuple[Sequence[tuple[int, ...]], float, float]] = (),
        *,
        choosing: bool = False,
    ) -> None:
        self.texts = read_texts(tiny)
        # as the page on stream matching says: about one text in eight, by a hash of its tokens
        self.held = [
            choosing and crc32(" ".join(map(str, text.ids)).encode()) % 8 == 0
            for text in self.texts
        ]
        self.chosen: dict[str, float] = {}
        own = [text.ids for text in self.texts]
        self.reasoning = tiny.model("reasoning")
        self.instruct = tiny.model("instruct")
        self.merged = tiny.model("reasoning")
        self.apart: list[float] = []
        self._start(tiny.config().settings.stream_start)
        self.own = Hooks(self.merged)
        self.base = self.run(self.reasoning, Hooks(self.reasoning), own)
        hooks = Hooks(self.instruct)
        given = readings or [(own, 0.0, 1.0)]
        self.taught = [
            (self.run(self.instruct, hooks, ids), keeps, share) for ids, keeps, share in given
        ]
        self.read = given[0][0]  # by the instruct model as it is asked
        self.even = tiny.config().settings.stream_emphasis == "even"
        self.margin = tiny.config().settings.answer_margin

    def _start(self, start: float | str) -> None:
        """Each linear map of the layers between the reasoning and the instruct model."""
        for name, module in self.merged.model.layers.named_modules():
            if isinstance(module, nn.Linear):
                other = self.instruct.model.layers.get_submodule(name).weight
                share = start
                if isinstance(share, str):  # half-way, up to a quarter of its size
                    apart = float(
                        (other - module.weight).detach().norm() / module.weight.detach().norm()
                    )
                    share = 0.5 if apart <= 0.25 else 0.0
                    self.apart.append(apart)
                with torch.no_grad():
                    module.weight.mul_(1 - share).add_(other, alpha=share)

    def run(
        self, model: Any, hooks: Hooks, texts: Sequence[tuple[int, ...]]
    ) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        found = []
        for ids in texts:
            with torch.no_grad():
                model(input_ids=torch.tensor([ids]))
            found.append((dict(hooks.inputs), dict(hooks.outputs)))
        return found

    @cached_property
    def weight(self) -> Tensor:
        """Of each token, by the number of its group's among those fitted, or those held out."""
        kinds = [
            (group, held)
            for text, held in zip(self.texts, self.held, strict=True)
            for group in text.groups
        ]
        weights, emphasis = {**WEIGHTS, UNTAUGHT: 0.0}, self.emphasis.tolist()
        sums: dict[tuple[str, bool], float] = {}
        for kind, factor in zip(kinds, emphasis, strict=True):
            sums[kind] = sums.get(kind, 0.0) + factor
        shares = zip(kinds, emphasis, strict=True)
        return torch.tensor([weights[k[0]] * f / sums[k] for k, f in shares], dtype=torch.float64)

    @cached_property
    def emphasis(self) -> Tensor:
        """At answers KL(instruct ‖ reasoning) + 0.1 of the next token, elsewhere 1."""
        parts = []
        for text, reading in zip(self.texts, self.read, strict=True):
            part = torch.ones(len(text.ids), dtype=torch.float64)
            count = int(text.answers.sum())
            if count and not self.even:
                own, other = self.next_tokens(text, reading)
                apart = nn.functional.kl_div(own, other, log_target=True, reduction="none").sum(-1)
                part[-count:] = apart + 0.1
            parts.append(part)
        return torch.cat(parts)

    def next_tokens(self, text: Text, reading: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Both models' log probabilities of what follows each answer token."""
        pairs, count = (
            ((self.reasoning, text.ids), (self.instruct, reading)),
            int(text.answers.sum()),
        )
        with torch.no_grad():
            own, other = (
                model(input_ids=torch.tensor([ids])).logits[0, -count:].log_softmax(-1)
                for model, ids in pairs
            )
        return own, other

    @cached_property
    def better(self) -> list[list[int]]:
        """Of each text, the answer tokens of which the reasoning model says better what follows."""
        found: list[list[int]] = []
        for text, reading in zip(self.texts, self.read, strict=True):
            count = int(text.answers.sum())
            places: list[int] = []
            if count and self.margin is not None:
                own, other = self.next_tokens(text, reading)
                following = text.ids[1 - count :]
                places = [
                    len(text.ids) - count + row
                    for row, token in enumerate(following)
                    if float(own[row, token] - other[row, token]) > self.margin
                ]
            found.append(places)
        return found

    @cached_property
    def aside(self) -> Tensor:
        pairs = zip(self.texts, self.held, strict=True)
        return torch.tensor([held for text, held in pairs for _ in text.groups])

    def targets(self, key: str) -> Tensor:
        rows = []
        for index, text in enumerate(self.texts):
            target = self.base[index][1][key].clone()
            own = target[self.better[index]]
            count = int(text.answers.sum())
            if count:
                places = [*text.asked, *range(len(target) - count, len(target))]
                for outputs, keeps, share in self.taught:
                    given = outputs[index][1][key]
                    shift = len(given) - len(target)  # what this reading has more, in front
                    taught = given[[place + shift for place in places]]
                    target[places] = keeps * target[places] + share * taught
            target[self.better[index]] = own
            rows.append(target)
        return torch.cat(rows)

    def fit(self) -> dict[str, Tensor]:
        """The change of each weight, in the order in which the modules run."""
        changes: dict[str, Tensor] = {}
        for index in range(len(self.merged.model.layers)):
            for members in SITES.values():
                changes |= self.fit_site(index, members)
        return changes

    def fit_site(self, index: int, members: Sequence[str]) -> dict[str, Tensor]:
        """Modules of layer `index` that see the same input; the merged model is changed."""
        changes: dict[str, Tensor] = {}
        now = self.run(self.merged, self.own, [text.ids for text in self.texts])
        for member in members:
            name = f"model.layers.{index}.{member}"
            key = {
                "self_attn.o_proj": f"model.layers.{index}.after attention",
                "mlp.down_proj": f"model.layers.{index}.after mlp",
            }.get(member, name)
            x = torch.cat([inputs[name] for inputs, _ in now])
            error = self.targets(key) - torch.cat([outputs[key] for _, outputs in now])
            changes[name] = self._ridge(name, x, error)
        for name, change in changes.items():
            with torch.no_grad():
                self.merged.get_submodule(name).weight += change
        return changes

    def _ridge(self, name: str, x: Tensor, error: Tensor) -> Tensor:
        weight = torch.diag(self.weight * ~self.aside)
        gram = x.mT @ weight @ x
        eye = torch.eye(len(gram), dtype=torch.float64)
        found = {}
        for epsilon in CANDIDATES if any(self.held) else (EPSILON,):
            system = gram + epsilon * gram.trace() / len(gram) * eye
            found[epsilon] = error.mT @ weight @ x @ torch.linalg.inv(system)

        def left(change: Tensor) -> float:
            missed = (error - x @ change.mT)[self.aside]
            return float((self.weight[self.aside, None] * missed.square()).sum())

        without = left(torch.zeros_like(found[EPSILON]))
        self.chosen[name] = by_rule({key: without - left(value) for key, value in found.items()})
        return found[self.chosen[name]]


def by_rule(removed: Mapping[float, float]) -> float:
    """The largest ε that removes 85 % of the error held out that the best one removes."""
    best = max(removed.values())
    enough = 0.85 * best if best > 0 else best
    return max(epsilon for epsilon, share in removed.items() if share >= enough)


def changes(tiny: Tiny) -> dict[str, Tensor]:
    found = products(tiny.path)
    return {name.removesuffix(".weight"): change for name, change in found.items()}


def agree(tiny: Tiny, reference: Reference, **options: Any) -> None:
    tiny.calibrate(dtype=torch.float64, **options)
    expected, found = reference.fit(), changes(tiny)
    assert found.keys() == expected.keys()
    for name, change in expected.items():  # some are zero, but for rounding
        assert float((found[name] - change).norm()) <= 1e-5 * float(change.norm()) + 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_the_streamed_fit_equals_the_dense_one(tmp_path: Path, family: str) -> None:
    tiny = Tiny.make(tmp_path, family).using(**WHOLE)
    agree(tiny, Reference(tiny))


@pytest.mark.parametrize("family", ["qwen2", "llama-bias"])
def test_the_fit_may_start_between_both_models(tmp_path: Path, family: str) -> None:
    tiny = Tiny.make(tmp_path, family).using(**WHOLE, stream_start=0.3)
    agree(tiny, Reference(tiny))


def test_weights_that_are_far_apart_start_as_the_reasoning_model(tmp_path: Path) -> None:
    """In every second layer map the instruct model is brought near; the others stay random."""
    tiny = Tiny.make(tmp_path, "qwen2").using(**WHOLE)
    own, tuned = (read_weights(tmp_path / role) for role in ("reasoning", "instruct"))
    names = sorted(name for name in own if ".layers." in name and own[name].dim() == 2)
    for name in names[::2]:
        tuned[name] = own[name] + 0.1 * (tuned[name] - own[name])
    save_file(tuned, tmp_path / "instruct" / "model.safetensors", metadata={"format": "pt"})
    reference = Reference(tiny)
    assert min(reference.apart) < 0.24
    assert max(reference.apart) > 0.26
    agree(tiny, reference)
    entries = CalibrationFile.open(tiny.path).header["tensors"]
    starts = [entries[name].get("start", 0.0) for name in names]
    assert starts == [0.5 * (place % 2 == 0) for place in range(len(names))]


@pytest.mark.parametrize("family", ["qwen2", "llama-bias"])
def test_the_reasoning_model_teaches_what_it_says_better(tmp_path: Path, family: str) -> None:
    tiny = Tiny.make(tmp_path, family).using(**WHOLE, teacher_margin=0.1)
    reference = Reference(tiny)
    kept, answers = (
        sum(map(len, reference.better)),
        sum(int(t.answers.sum()) for t in reference.texts),
    )
    assert 0 < kept < answers
    agree(tiny, reference)


def test_without_weights_the_answers_are_read_for_that_alone(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "llama").using(**WHOLE, teacher_margin=0.1, stream_emphasis="even")
    agree(tiny, Reference(tiny))


def test_a_very_wide_input_is_fitted_exactly_where_all_tokens_are_landmarks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    width = 640
    tiny = Tiny.make(tmp_path, "llama", intermediate_size=width).using(**WHOLE)
    reference = Reference(tiny)
    count = sum(len(text.ids) for text in reference.texts)
    budget = MATRICES * count**2 + LANDMARKS * count * width
    assert directions_within(width, budget) == count < width
    with caplog.at_level(logging.INFO, logger=site_sums.__name__):
        agree(tiny, reference, activation_budget=2 * budget)
    assert f"down_proj: fitted within {count} of {width} directions" in caplog.text


def write_many(folder: Path, count: int = 20) -> None:
    """Sets of `count` samples each, enough that some are held out."""
    own = [
        {"prompt": f"Is {n} odd?", "reasoning": f"Half of {n} is {n / 2}.", "response": f"So {n}."}
        for n in range(count)
    ]
    asked = [
        {**INSTRUCTION[2], "prompt": f"Say hello {n} in brackets.", "reason": f"{n} it is, then."}
        for n in range(count)
    ]
    for name, samples in (("reasoning", own), ("instruction", asked)):
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        (folder / f"{name}.jsonl").write_text(lines)


def test_epsilon_is_chosen_by_the_texts_that_are_held_out(tmp_path: Path) -> None:
    """For each weight by trying all; dense, with the texts that the file's sizes show as held."""
    settings = {name: value for name, value in WHOLE.items() if name != "stream_epsilon"}
    tiny = Tiny.make(tmp_path, "llama").using(**settings)
    write_many(tmp_path, 40)
    reference = Reference(tiny, choosing=True)
    assert 1 <= sum(reference.held) < len(reference.held)
    agree(tiny, reference)
    file = CalibrationFile.open(tiny.path)
    found = {n: file.header["tensors"][f"{n}.weight"]["fit"]["epsilon"] for n in reference.chosen}
    assert found == reference.chosen
    assert len(set(found.values())) > 1
    assert EPSILON not in found.values()  # what is taken where nothing is held out


def test_the_instruct_model_alone_teaches_what_follows_a_prompt_of_both_sets(
    tmp_path: Path,
) -> None:
    tiny = Tiny.make(tmp_path, "llama").using(**WHOLE)
    own = {**INSTRUCTION[0], "reasoning": "Grass is green.", "response": "Green it is."}
    sample = {name: own[name] for name in ("prompt", "reasoning", "response")}
    with (tmp_path / "reasoning.jsonl").open("a") as file:
        file.write(json.dumps(sample) + "\n")
    reference = Reference(tiny)
    assert any(UNTAUGHT in text.groups for text in reference.texts)
    agree(tiny, reference)


def test_a_part_of_the_instruct_model_is_aimed_at(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "llama").using(**WHOLE, teacher_strength=0.4)
    own = [text.ids for text in read_texts(tiny)]
    agree(tiny, Reference(tiny, [(own, 0.6, 0.4)]))


def test_the_instruct_model_reads_in_its_own_chat_format(tmp_path: Path) -> None:
    """Its template puts a system message in front, so that its answers stand elsewhere."""
    tiny = Tiny.make(tmp_path, "llama").using(**WHOLE)
    agree(tiny, Reference(tiny, [(with_system_message(tiny), 0.0, 1.0)]))


def with_system_message(tiny: Tiny) -> list[tuple[int, ...]]:
    """What the instruct model reads once its template puts a system message in front."""
    own = tiny.tokenizer()
    own.chat_template = "<|user|>Be kind.<|end|>" + TEMPLATE
    own.save_pretrained(tiny.folder / "instruct")
    front = tuple(own("<|user|>Be kind.<|end|>", add_special_tokens=False)["input_ids"])
    return [(*front, *text.ids) for text in read_texts(tiny)]


def test_the_contrast_is_what_the_instruction_changes(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "llama").using(**WHOLE, teacher="contrast", teacher_strength=0.7)
    own = [text.ids for text in read_texts(tiny)]
    bare = [*own[: len(REASONING)], *(without_instructions(tiny, one) for one in INSTRUCTION)]
    agree(tiny, Reference(tiny, [(own, 1.0, 0.7), (bare, 1.0, -0.7)]))


def without_instructions(tiny: Tiny, sample: Mapping[str, Any]) -> tuple[int, ...]:
    """The sample's token ids with its instructions cut out of the prompt, written by hand."""
    prompt = {
        "Which colour has grass? Answer in capitals.": "Which colour has grass?",
        "Count to three. Use commas. End with a dot.": "Count to three.",
        "Say hello in brackets.": "Say hello .",
    }[sample["prompt"]]
    text = (
        f"<|user|>{prompt}<|end|><|assistant|><think>\n{sample['reason']}\n</think>\n\n"
        f"{sample['response']}"
    )
    return tuple(tiny.tokenizer()(text, add_special_tokens=False)["input_ids"])
