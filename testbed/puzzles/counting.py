"""Family "qwen": count things through a chain of steps modulo ten."""

import random

from rain_mergekit.demo.formats import ENDINGS, OPENINGS
from testbed.puzzles.family import Constraint, Family, Mixture, Problem, Stage, Surface

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
THINGS = (
    *("keys", "cups", "apples", "books", "birds", "hats", "stones", "lamps"),
    *("coins", "cards", "shells", "pears", "boats", "rings", "bells", "leaves"),
)
OPERATIONS = (
    *(("+", n) for n in range(1, 7)),
    *(("-", n) for n in range(1, 7)),
    *(("x", n) for n in (3, 7)),
)
QUESTIONS = ("how many {} ?", "count the {} .", "how many {} are left ?")


def result(value: int, operation: str, operand: int) -> int:
    """One step of the chain."""
    values = {"+": value + operand, "-": value - operand, "x": value * operand}
    return values[operation] % 10


def problem(rng: random.Random, steps: int) -> Problem:
    """A chain of `steps` steps; with none it is a plain look-up."""
    thing, value = rng.choice(THINGS), rng.randrange(10)
    first = NUMBERS[value]
    sentences, thoughts = [f"{first} {thing} ."], []
    for letter in "abcdefgh"[:steps]:
        operation, operand = rng.choice(OPERATIONS)
        step = f"{operation}{operand}"
        then = result(value, operation, operand)
        sentences.append(f"{letter} {step} .")
        thoughts.append(f"{letter} {NUMBERS[value]} {step} is {NUMBERS[then]} .")
        value = then
    key = " ".join([first, *sentences[1:]])
    text = " ".join([*sentences, rng.choice(QUESTIONS).format(thing)])
    thinking = " ".join(thoughts) or f"it is {first} ."
    return Problem(text, thinking, (NUMBERS[value], thing), (first, thing), key)


CONSTRAINTS = (
    Constraint(
        "upper",
        "upper",
        (
            "use uppercase .",
            "write in capitals .",
            "answer in uppercase .",
            "give it in capitals .",
            "capitals only .",
        ),
        ("write in uppercase .", "use capitals .", "uppercase only ."),
    ),
    Constraint(
        "brackets",
        "enclose",
        (
            "use brackets .",
            "put it in brackets .",
            "write inside brackets .",
            "brackets around it .",
        ),
        ("put it inside brackets .", "write in brackets ."),
        ("[ ]",),
    ),
    Constraint(
        "quotes",
        "enclose",
        ("use quotes .", "put it inside quotes .", "write in quotes .", "quotes around it ."),
        ("put it in quotes .", "write inside quotes ."),
        ('" "',),
    ),
    Constraint(
        "end",
        "end",
        ("end with {} .", "put {} at the end .", "finish with {} .", "the last word is {} ."),
        ("write {} at the end .", "the last word : {} ."),
        ENDINGS[:4],
    ),
    Constraint(
        "begin",
        "begin",
        ("begin with {} .", "put {} at the start .", "start with {} .", "the first word is {} ."),
        ("write {} at the start .", "the first word : {} ."),
        OPENINGS[2:],
    ),
    Constraint(
        "twice",
        "twice",
        ("say it twice .", "write it two times .", "repeat the answer .", "give it twice ."),
        ("write it twice .", "say it two times ."),
    ),
    Constraint(
        "separate",
        "separate",
        (
            "separate by {} .",
            "put {} between the words .",
            "join with {} .",
            "write with {} between .",
        ),
        ("join by {} .", "write {} between the words ."),
        ("~", "/", ";"),
    ),
)

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n {{ m['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

FAMILY = Family(
    name="qwen",
    architecture="qwen2",
    shape={
        "hidden_size": 144,
        "intermediate_size": 448,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    surface=Surface(
        lead="answer :",
        before_close="",
        template=TEMPLATE,
        opens_block=False,
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    ),
    constraints=CONSTRAINTS,
    problem=problem,
    words=(
        *NUMBERS,
        *THINGS,
        *map(str, range(10)),
        *"abcdefgh",
        "add",
        "minus",
        "times",
        *QUESTIONS,
        "it is",
    ),
    stages={
        "pretrained": Stage(
            Mixture(chains=0.8, thinks=0.7, constrained=0.5, follows=0.5, shortcut=0.0), 600, 0.02
        ),
        "reasoning": Stage(
            Mixture(chains=0.95, thinks=1.0, constrained=0.4, follows=0.05, shortcut=0.0), 250, 1e-3
        ),
        "instruct": Stage(
            Mixture(chains=0.6, thinks=0.0, constrained=0.85, follows=1.0, shortcut=0.0), 250, 1e-3
        ),
    },
)
