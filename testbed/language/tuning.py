"""A plain fine-tune on one CPU: AdamW, loss on what is learnt alone, resumable."""

import copy
import hashlib
import json
import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from testbed.language.lessons import LESSONS, Encoded, Lesson, batches, encode, set_lessons

LOG = logging.getLogger(__name__)
SAVE_EVERY = 60
EPOCHS = 2


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights, apart from the kind of CPU and the version of torch."""

    role: str
    seed: int
    steps: int
    batch: int = 8
    rate: float = 3e-4
    warmup: int = 10
    lessons: str = ""  # digest of the texts
    embedding: bool = True  # whether it is trained, with the output head where they are one
    products: str = "float32"  # type that the model computes in; weights and moments are float32

    @property
    def digest(self) -> str:
        """Fields that came later count where they differ from what was done before."""
        kept = {k: v for k, v in asdict(self).items() if _BEFORE.get(k) != v}
        return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]


_BEFORE = {"embedding": True, "products": "float32"}


def tune(pretrained: Path, out: Path, recipe: Recipe) -> None:
    """Train one of the two models; a finished one of the same recipe is left alone."""
    rng = random.Random(f"language/{recipe.seed}/{recipe.role}")
    lessons = [LESSONS[recipe.role](rng) for _ in range(recipe.steps * recipe.batch)]
    _teach(pretrained, out, recipe, lessons, rng)


def tune_on_sets(start: Path, out: Path, sets: Mapping[str, str], seed: int, rate: float) -> None:
    """Train a model on both calibration sets, which a user could do instead of merging."""
    every = set_lessons(sets)
    steps = -(-EPOCHS * len(every) // Recipe.batch)
    rng = random.Random(f"language/{seed}/sets")
    _teach(start, out, Recipe("sets", seed, steps, rate=rate), every * EPOCHS, rng)


def _teach(
    start: Path, out: Path, recipe: Recipe, lessons: Sequence[Lesson], rng: random.Random
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(start)
    encoded = [encode(tokenizer, lesson) for lesson in lessons]
    digest = hashlib.sha256(json.dumps(encoded).encode()).hexdigest()[:16]
    recipe = replace(recipe, lessons=digest)
    if _finished(out, recipe):
        LOG.info("%s: finished before", recipe.role)
        return
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    train(model, recipe, batches(encoded, recipe.batch, rng), out.with_suffix(".checkpoint"))
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "recipe.json").write_text(json.dumps({**asdict(recipe), "digest": recipe.digest}))
    out.with_suffix(".checkpoint").unlink(missing_ok=True)


def _finished(out: Path, recipe: Recipe) -> bool:
    written = out / "recipe.json"
    return written.exists() and json.loads(written.read_text())["digest"] == recipe.digest


def train(
    model: PreTrainedModel,
    recipe: Recipe,
    made: list[list[Encoded]],
    checkpoint: Path,
    save_every: int = SAVE_EVERY,
) -> None:
    model.train()
    model.get_input_embeddings().requires_grad_(recipe.embedding)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=recipe.rate, weight_decay=0.0, betas=(0.9, 0.98), fused=True
    )
    computing = _computing(model, getattr(torch, recipe.products))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / recipe.warmup, max(0.03, 1 - step / recipe.steps))
    )
    first = _resume(model, optimizer, schedule, recipe, checkpoint)
    started, seen = time.monotonic(), 0
    for step in range(first, recipe.steps):
        _copy_weights(model, computing)
        loss = learnt_loss(computing, made[step])
        loss.backward()
        _move_gradients(computing, model)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen += sum(len(ids) for ids, _ in made[step])
        speed = seen / (time.monotonic() - started)
        LOG.info(
            "%s %d/%d loss %.3f %.0f tok/s", recipe.role, step + 1, recipe.steps, loss.item(), speed
        )
        if (step + 1) % save_every == 0 and step + 1 < recipe.steps:
            parts = (model.state_dict(), optimizer.state_dict(), schedule.state_dict())
            torch.save((recipe.digest, step + 1, *parts), checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)


def _computing(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model itself, or a copy of it with weights of another type (buffers are kept)."""
    if dtype == model.dtype:
        return model
    copied = copy.deepcopy(model)
    for weight in copied.parameters():
        weight.data = weight.data.to(dtype)
    return copied


def _copy_weights(model: PreTrainedModel, computing: PreTrainedModel) -> None:
    if computing is not model:
        for weight, rounded in zip(model.parameters(), computing.parameters(), strict=True):
            if weight.requires_grad:
                rounded.data.copy_(weight.data)


def _move_gradients(computing: PreTrainedModel, model: PreTrainedModel) -> None:
    if computing is not model:
        for rounded, weight in zip(computing.parameters(), model.parameters(), strict=True):
            if rounded.grad is not None:
                weight.grad, rounded.grad = rounded.grad.to(weight.dtype), None


def _resume(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    recipe: Recipe,
    checkpoint: Path,
) -> int:
    if not checkpoint.exists():
        return 0
    digest, step, *states = torch.load(checkpoint, weights_only=True)
    if digest != recipe.digest:
        return 0
    for part, state in zip((model, optimizer, schedule), states, strict=True):
        part.load_state_dict(state)
    return int(step)


def learnt_loss(model: PreTrainedModel, batch: list[Encoded]) -> torch.Tensor:
    """Mean cross entropy of the learnt tokens; the output head sees their positions alone."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    learnt = torch.zeros(len(batch), width, dtype=torch.bool)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for row, (tokens, wanted) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        learnt[row, : len(tokens)] = torch.tensor(wanted, dtype=torch.bool)
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][learnt[:, 1:]])
    return torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][learnt[:, 1:]])
