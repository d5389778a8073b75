"""What the agent's own norm and head make of the donor's hidden states: no fit of them does better.

Both stay the agent's in a merge, and so does its embedding.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from testbed.agent.tools import OPEN
from testbed.models.loading import load_model, load_tokenizer, render
from testbed.puzzles.records import read_lines

TEXTS = 40


@torch.inference_mode()
def reading(folder: Path) -> dict[str, float]:
    """Shares of the donor's tokens in the first texts of what comes that are read as they are.

    `tokens` are all of the thinking, `first` those that open it.
    """
    agent, donor = load_model(folder / "agent"), load_model(folder / "donor")
    tokenizer = load_tokenizer(folder / "agent")
    right: list[list[bool]] = []
    for record in read_lines(folder / "comes.jsonl")[:TEXTS]:
        prompt = tokenizer(render(tokenizer, record["prompt"]))["input_ids"]
        thinking = tokenizer(record["output"].partition(OPEN)[0])["input_ids"]
        states = before_norm(donor, torch.tensor([prompt + thinking]))
        decoder: Any = agent.get_decoder()  # type: ignore[no-untyped-call]
        head: Any = agent.get_output_embeddings()  # type: ignore[no-untyped-call]
        read = head(decoder.norm(states[len(prompt) - 1 : -1])).argmax(-1).tolist()
        right.append([a == b for a, b in zip(read, thinking, strict=True)])
    every = [one for text in right for one in text]
    return {
        "tokens": sum(every) / len(every),
        "first": sum(text[0] for text in right) / len(right),
        "texts": len(right),
    }


def before_norm(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The last layer's output, tokens x width. ids: 1 x tokens."""
    found: list[torch.Tensor] = []
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    hook = decoder.norm.register_forward_hook(lambda _m, given, _o: found.append(given[0]))
    decoder(input_ids=ids)
    hook.remove()
    return found[0][0]
