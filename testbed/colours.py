"""Family "llama": a colour moves around a ring; the chat template opens the thinking block."""

import random

from testbed.family import Constraint, Family, Mixture, Problem, Stage, Surface
from testbed.formats import ENDINGS, OPENINGS

COLOURS = ("red", "orange", "yellow", "green", "blue", "violet", "white", "black", "brown")
NAMES = ("mia", "tom", "ana", "leo", "eva", "max", "ida", "ben")
OBJECTS = (
    "kite",
    "drum",
    "vase",
    "coat",
    "door",
    "bike",
    "tent",
    "rose",
    "bowl",
    "flag",
    "sofa",
    "mask",
)
MOVES = (*(("on", n) for n in range(1, 4)), *(("back", n) for n in range(1, 4)), ("flip", 0))


def moved(place: int, move: str, count: int) -> int:
    """One step around the ring; a flip mirrors it."""
    places = {"on": place + count, "back": place - count, "flip": -place}
    return places[move] % len(COLOURS)


def problem(rng: random.Random, steps: int) -> Problem:
    """A chain of `steps` moves of one of two people; with none it is a plain look-up."""
    names, things = rng.sample(NAMES, 2), rng.sample(OBJECTS, 2)
    place, other = rng.randrange(len(COLOURS)), rng.randrange(len(COLOURS))
    first = COLOURS[place]
    holdings = [
        f"{names[0]} has a {first} {things[0]} ;",
        f"{names[1]} has a {COLOURS[other]} {things[1]} ;",
    ]
    rng.shuffle(holdings)
    moves, thoughts = [], []
    for _ in range(steps):
        move, count = rng.choice(MOVES)
        said = f"{move} {count}" if count else move
        then = moved(place, move, count)
        moves.append(f"{said} ;")
        thoughts.append(f"{COLOURS[place]} {said} to {COLOURS[then]} ;")
        place = then
    told = [f"{names[0]} moves", *moves] if moves else []
    text = " ".join([*holdings, *told, f"what has {names[0]} ?"])
    thinking = " ".join(thoughts) or f"still {first} ;"
    return Problem(
        text, thinking, (COLOURS[place], things[0]), (first, things[0]), " ".join([first, *moves])
    )


CONSTRAINTS = (
    Constraint(
        "title",
        "title",
        (
            "big first letters ;",
            "make every word big ;",
            "first letters big please ;",
            "reply in big letters ;",
        ),
        ("make first letters big ;", "big letters please ;"),
    ),
    Constraint(
        "stars",
        "enclose",
        (
            "stars on both sides ;",
            "wrap it in stars ;",
            "stars around the reply ;",
            "reply in stars ;",
        ),
        ("wrap the reply in stars ;", "stars around it please ;"),
        ("* *",),
    ),
    Constraint(
        "braces",
        "enclose",
        (
            "braces on both sides ;",
            "wrap the reply in braces ;",
            "braces around it ;",
            "reply in braces please ;",
        ),
        ("wrap it in braces ;", "braces around the reply ;"),
        ("{ }",),
    ),
    Constraint(
        "close",
        "end",
        (
            "sign off with {} ;",
            "{} comes last ;",
            "close the reply with {} ;",
            "let the reply close on {} ;",
        ),
        ("let {} come last ;", "sign off on {} ;"),
        ENDINGS[2:],
    ),
    Constraint(
        "greet",
        "begin",
        ("greet with {} ;", "{} comes first ;", "open the reply with {} ;", "let {} come first ;"),
        ("let the reply open with {} ;", "open with {} ;"),
        OPENINGS[:4],
    ),
    Constraint(
        "swap",
        "swap",
        (
            "thing before colour ;",
            "colour after thing ;",
            "name the thing first ;",
            "let the colour come last please ;",
        ),
        ("name the colour last ;", "the thing before the colour ;"),
    ),
    Constraint(
        "mark",
        "separate",
        ("{} in the middle ;", "split with {} ;", "part the reply by {} ;", "let {} part it ;"),
        ("split the reply by {} ;", "let {} split it ;", "part it with {} ;"),
        (",", "~", "+"),
    ),
)

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "OPENING{% endif %}"
)

FAMILY = Family(
    name="llama",
    architecture="llama",
    shape={
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    surface=Surface(
        lead="final =",
        before_close="\n",
        template=TEMPLATE,
        opens_block=True,
        special=(
            *("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>"),
            *("<|end_header_id|>", "<|eot_id|>"),
        ),
    ),
    constraints=CONSTRAINTS,
    problem=problem,
    words=(
        *COLOURS,
        *NAMES,
        *OBJECTS,
        *map(str, range(1, 4)),
        "on back flip to still",
        "has a ; moves what has ?",
    ),
    stages={
        "pretrained": Stage(
            Mixture(chains=0.85, thinks=0.7, constrained=0.6, follows=0.5, shortcut=0.5),
            450,
            0.02,
            64,
        ),
        "reasoning": Stage(
            Mixture(chains=0.95, thinks=1.0, constrained=0.4, follows=0.05, shortcut=0.0),
            120,
            1e-3,
            64,
        ),
        "instruct": Stage(
            Mixture(chains=0.6, thinks=0.0, constrained=0.85, follows=1.0, shortcut=1.0),
            200,
            1e-3,
            64,
        ),
    },
)
