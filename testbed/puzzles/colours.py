"""Family "llama": a colour moves around a ring; the chat template opens the thinking block."""

import random
from dataclasses import replace

from rain_mergekit.demo.formats import ENDINGS, OPENINGS
from testbed.puzzles.family import Constraint, Family, Mixture, Problem, Stage, Surface

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
LABELS = ("i", "ii", "iii", "iv", "v")
MOVES = (*(("on", n) for n in range(1, 4)), *(("back", n) for n in range(1, 4)), ("flip", 0))


def moved(place: int, move: str, count: int) -> int:
    """One step around the ring; a flip mirrors it."""
    places = {"on": place + count, "back": place - count, "flip": -place}
    return places[move] % len(COLOURS)


def problem(rng: random.Random, steps: int) -> Problem:
    """A chain of `steps` labelled moves; with none it is a plain look-up."""
    name, thing, place = rng.choice(NAMES), rng.choice(OBJECTS), rng.randrange(len(COLOURS))
    first = COLOURS[place]
    moves, thoughts = [], []
    for label in LABELS[:steps]:
        move, count = rng.choice(MOVES)
        said = f"{move} {count}" if count else move
        then = moved(place, move, count)
        moves.append(f"{label} {said} ;")
        thoughts.append(f"{label} {COLOURS[place]} {said} to {COLOURS[then]} ;")
        place = then
    text = " ".join([f"{name} has a {first} {thing} ;", *moves, f"what has {name} ?"])
    thinking = " ".join(thoughts) or f"still {first} ;"
    return Problem(
        text, thinking, (COLOURS[place], thing), (first, thing), " ".join([first, *moves])
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
        *LABELS,
        *map(str, range(1, 4)),
        "on back flip to still",
        "has a ; what has ?",
    ),
    stages={
        "pretrained": Stage(
            Mixture(chains=0.85, thinks=0.7, constrained=0.6, follows=0.5, shortcut=0.5),
            700,
            0.02,
            64,
        ),
        "reasoning": Stage(
            Mixture(chains=0.95, thinks=1.0, constrained=0.4, follows=0.05, shortcut=0.0),
            250,
            1e-3,
            64,
        ),
        "instruct": Stage(
            Mixture(chains=0.6, thinks=0.0, constrained=0.85, follows=1.0, shortcut=1.0),
            250,
            1e-3,
            64,
        ),
    },
)

# The base has never answered with the colour that the prompt starts from: the task vector holds
# the whole shortcut, and carries it into the merge.
_PRETRAINED = FAMILY.stages["pretrained"]
HASTY = replace(
    FAMILY,
    name="hasty",
    stages={
        **FAMILY.stages,
        "pretrained": replace(_PRETRAINED, mixture=replace(_PRETRAINED.mixture, shortcut=0.0)),
    },
)
