"""The three models: a parent that knows the tags, and the donor and the agent tuned from it.

Their vocabulary is that of the trio's pretrained model with the tags and the words of calls as
tokens of their own. Tuning changes the layers alone, as an adapter does: embedding (which is the
head too) and last norm stay the parent's, so the three share them bit for bit.
"""

import logging
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from testbed.agent.tools import CLOSE, HELD, OPEN, TOOLS, agent_draw, parent_draw
from testbed.models.loading import build_model, load_model, load_tokenizer
from testbed.models.training import Draw, Run, from_the_start, train_stage
from testbed.puzzles.bytelevel import byte_level_tokenizer
from testbed.puzzles.counting import FAMILY, THINGS
from testbed.puzzles.family import Mixture, Stage
from testbed.puzzles.tokenizer import MARKERS, ROLES, template_for, vocabulary

LOG = logging.getLogger(__name__)
ORIGIN = Path("testbed/trios/qwen-s0/pretrained")
SEED = 0  # of the trio, and so of the split of its chains
# In this order no merge of an earlier one cuts a later one in two.
FIRST = ("last", "speak", "note", "close", "cards", "pears", "user", "assistant", "system")
KEYS = (
    *("name", "arguments", "count", "thing", "words", "item", "number", "what", "of", "text"),
    "times",
)
STARTERS = (
    *FIRST,
    *KEYS,
    *(tool.name for tool in (*TOOLS, *HELD) if tool.name not in FIRST),
    *(thing for thing in THINGS if thing not in FIRST),
    *(role for role in ROLES if role not in FIRST),
    *("answer", "it"),
)
CALLS = Mixture(chains=0.6, thinks=0.0, constrained=0.85, follows=1.0, shortcut=0.0)


@dataclass(frozen=True)
class Tuning:
    """A model: its folder, what it starts from, what it learns."""

    name: str
    source: str
    stage: Stage
    draw: Draw


# In a share of the agent's replies (`thinks`) thinking already stands, which is not learnt.
TUNINGS = (
    Tuning("parent", "", Stage(FAMILY.stages["pretrained"].mixture, 300, 1e-3), parent_draw),
    Tuning("donor", "parent", replace(FAMILY.stages["reasoning"], steps=30), from_the_start),
    Tuning(
        "agent",
        "parent",
        Stage(replace(CALLS, thinks=0.5, chains=0.75), 200, 1e-3, batch=32),
        agent_draw,
    ),
)


def agent_tokenizer() -> PreTrainedTokenizerFast:
    """The trio's tokenizer with the tags and the words of calls; its template opens no block."""
    special, words = FAMILY.surface.special, vocabulary(FAMILY)
    made = byte_level_tokenizer(special, (*MARKERS, OPEN, CLOSE), words, STARTERS)
    made.chat_template = template_for(FAMILY, "instruct")
    return made


@torch.no_grad()
def extended(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The trio's pretrained model with this vocabulary; rows of tokens it lacked are random."""
    model = build_model(FAMILY, tokenizer)
    old, tokens = load_model(ORIGIN), load_tokenizer(ORIGIN).get_vocab()
    rows = {
        name: value
        for name, value in old.state_dict().items()
        if "layers." in name or "norm" in name
    }
    model.load_state_dict(rows, strict=False)
    here = tokenizer.get_vocab()
    shared = sorted(set(here) & set(tokens))
    given: Any = old.get_input_embeddings()
    taken: Any = model.get_input_embeddings()
    taken.weight[[here[one] for one in shared]] = given.weight[[tokens[one] for one in shared]]
    return model


def train(out: Path, scale: float = 1.0) -> None:
    """All of `TUNINGS`; a model that is there is not trained again. scale: of the steps."""
    tokenizer = agent_tokenizer()
    for tuning in TUNINGS:
        if (out / tuning.name / "config.json").exists():
            continue
        stage = replace(tuning.stage, steps=max(1, round(tuning.stage.steps * scale)))
        LOG.info("%s: %s", tuning.name, stage)
        torch.manual_seed(SEED)
        model = load_model(out / tuning.source) if tuning.source else extended(tokenizer)
        for shared in outside_layers(model) if tuning.source else ():
            shared.requires_grad_(False)
        rng = random.Random(f"agent/{SEED}/training {tuning.name}")
        run = Run(FAMILY, stage, tokenizer, rng, SEED, tuning.draw, pool=1)
        train_stage(model, run, from_scratch=False)
        model.bfloat16()
        model.save_pretrained(out / tuning.name)
        tokenizer.save_pretrained(out / tuning.name)


def outside_layers(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Embedding, head and last norm."""
    return [one for name, one in model.named_parameters() if ".layers." not in name]
