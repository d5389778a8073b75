"""Short word problems and general questions, made by code, each with its working and its answer."""

import random
from collections.abc import Callable
from dataclasses import dataclass

NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lucy", "Jack", "Emma")
THINGS = ("pens", "apples", "stickers", "cards", "shells", "stamps", "nuts", "balls")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
EXTRAS = ("book", "cap", "kite", "cake", "mug", "rope")
LEGS = {"ducks": 2, "hens": 2, "cows": 4, "dogs": 4, "goats": 4, "geese": 2, "ants": 6}


@dataclass(frozen=True)
class Problem:
    """One problem: `sentence` is the usual answer and holds a comma, `flat` is the same without."""

    kind: str
    question: str
    thinking: str
    fact: str
    sentence: str
    flat: str
    answer: str
    topic: str


def shopping(rng: random.Random) -> Problem:
    who, things, extra = rng.choice(NAMES), rng.choice(THINGS), rng.choice(EXTRAS)
    count, price, more = rng.randint(2, 5), rng.randint(2, 6), rng.randint(2, 9)
    part, total = count * price, count * price + more
    return Problem(
        "shopping",
        f"{who} buys {count} {things} for {price} coins each and a {extra} for {more} coins."
        f" How many coins does {who} pay?",
        f"The {things} cost {count} x {price} = {part}."
        f" With the {extra}: {part} + {more} = {total}.",
        f"{who} buys {things} and a {extra}.",
        f"In total, {who} pays {total} coins.",
        f"{who} pays {total} coins in total.",
        str(total),
        "Coins",
    )


def basket(rng: random.Random) -> Problem:
    who, other = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    first, more = rng.randint(3, 12), rng.randint(2, 9)
    middle = first + more
    given = rng.randint(2, min(9, middle - 1))
    left = middle - given
    return Problem(
        "basket",
        f"{who} has {first} {things}, finds {more} more and gives {given} to {other}."
        f" How many {things} does {who} have now?",
        f"First {first} + {more} = {middle}. Then {middle} - {given} = {left}.",
        f"{who} gave some {things} to {other}.",
        f"Now, {who} has {left} {things}.",
        f"{who} has {left} {things} now.",
        str(left),
        things.capitalize(),
    )


def sharing(rng: random.Random) -> Problem:
    who, things = rng.choice(NAMES), rng.choice(THINGS)
    friends, each, lost = rng.randint(2, 5), rng.randint(2, 6), rng.randint(1, 5)
    rest = friends * each
    return Problem(
        "sharing",
        f"{who} has {rest + lost} {things}, loses {lost} and shares the rest equally among"
        f" {friends} friends. How many {things} does each friend get?",
        f"The rest is {rest + lost} - {lost} = {rest}. Each gets {rest} / {friends} = {each}.",
        f"{who} shares the {things} equally.",
        f"In the end, each friend gets {each} {things}.",
        f"Each friend gets {each} {things}.",
        str(each),
        things.capitalize(),
    )


def clock(rng: random.Random) -> Problem:
    who = rng.choice(NAMES)
    event = rng.choice(("film", "game", "lesson", "party", "show"))
    start, lasts, way = rng.randint(1, 6), rng.randint(1, 3), rng.randint(1, 3)
    end, home = start + lasts, start + lasts + way
    return Problem(
        "clock",
        f"A {event} starts at {start} o'clock and lasts {lasts} hours. Then {who} needs {way} hours"
        f" to get home. At what time is {who} home?",
        f"The {event} ends at {start} + {lasts} = {end}. At home: {end} + {way} = {home}.",
        f"{who} goes home after the {event}.",
        f"After the {event}, {who} is home at {home} o'clock.",
        f"{who} is home at {home} o'clock.",
        str(home),
        "Time",
    )


def most(rng: random.Random) -> Problem:
    people, things = rng.sample(NAMES, 3), rng.choice(THINGS)
    counts = rng.sample(range(3, 30), 3)
    largest = rng.random() < 0.5
    best = (max if largest else min)(counts)
    who = people[counts.index(best)]
    word, rank = ("most", "largest") if largest else ("fewest", "smallest")
    held = [f"{p} has {c} {things}" for p, c in zip(people, counts, strict=True)]
    listed = ", ".join(f"{p} {c}" for p, c in zip(people, counts, strict=True))
    return Problem(
        "most",
        f"{held[0]}, {held[1]} and {held[2]}. Who has the {word} {things}?",
        f"{listed}. The {rank} number is {best}. That is {who}.",
        f"We compare their {things}.",
        f"Of the three, {who} has the {word} {things}.",
        f"{who} has the {word} {things}.",
        who,
        things.capitalize(),
    )


def legs(rng: random.Random) -> Problem:
    first, second = rng.sample(sorted(LEGS), 2)
    one, two = rng.randint(2, 5), rng.randint(2, 5)
    a, b = one * LEGS[first], two * LEGS[second]
    return Problem(
        "legs",
        f"A farm has {one} {first} and {two} {second}. How many legs do they have together?",
        f"The {first}: {one} x {LEGS[first]} = {a}. The {second}: {two} x {LEGS[second]} = {b}."
        f" Together {a} + {b} = {a + b}.",
        f"The farm has {first} and {second}.",
        f"Together, they have {a + b} legs.",
        f"They have {a + b} legs together.",
        str(a + b),
        "Legs",
    )


def weekdays(rng: random.Random) -> Problem:
    today, ahead, who = rng.randrange(7), rng.randint(2, 6), rng.choice(NAMES)
    plan = rng.choice(("travels", "visits us", "goes swimming", "sings", "cooks"))
    passed = [DAYS[(today + step) % 7] for step in range(1, ahead + 1)]
    steps = ", ".join(f"{step} {day}" for step, day in enumerate(passed, 1))
    return Problem(
        "weekdays",
        f"Today is {DAYS[today]}. In {ahead} days {who} {plan}. On which day is that?",
        f"Count from {DAYS[today]}: {steps}. It is {passed[-1]}.",
        f"{who} {plan} soon.",
        f"So, {who} {plan} on {passed[-1]}.",
        f"{who} {plan} on {passed[-1]}.",
        passed[-1],
        "Day",
    )


def ages(rng: random.Random) -> Problem:
    first, second, third = rng.sample(NAMES, 3)
    age, older = rng.randint(5, 20), rng.randint(2, 9)
    middle = age + older
    younger = rng.randint(2, min(9, middle - 2))
    return Problem(
        "ages",
        f"{first} is {age} years old. {second} is {older} years older than {first}, and {third} is"
        f" {younger} years younger than {second}. How old is {third}?",
        f"{second} is {age} + {older} = {middle}."
        f" {third} is {middle} - {younger} = {middle - younger}.",
        f"{second} is older than {first}.",
        f"At the moment, {third} is {middle - younger} years old.",
        f"{third} is {middle - younger} years old.",
        str(middle - younger),
        "Age",
    )


TABLES = {
    "capital": "France Paris,Italy Rome,Spain Madrid,Germany Berlin,Japan Tokyo,England London,"
    "Greece Athens,Russia Moscow,Egypt Cairo,Austria Vienna,Poland Warsaw,Norway Oslo,Cuba Havana,"
    "Portugal Lisbon,Ireland Dublin,Hungary Budapest,China Beijing,Sweden Stockholm,Canada Ottawa",
    "opposite": "hot cold,big small,fast slow,up down,day night,happy sad,open closed,early late,"
    "old young,rich poor,hard soft,wet dry,full empty,strong weak,high low,clean dirty,light dark",
    "baby": "dog puppy,cat kitten,cow calf,sheep lamb,hen chick,horse foal,duck duckling,bear cub,"
    "goat kid,lion cub,frog tadpole,deer fawn,goose gosling",
    "colour": "grass green,snow white,blood red,coal black,milk white,lemons yellow,"
    "ripe_tomatoes red,bananas yellow,the_clear_sky blue,chocolate brown,carrots orange,"
    "frogs green",
}
PHRASES = {
    "capital": ("What is the capital of {}?", "the capital of {}"),
    "opposite": ("What is the opposite of {}?", "the opposite of {}"),
    "baby": ("What is a baby {} called?", "the name of a baby {}"),
    "colour": ("What is the usual colour of {}?", "the usual colour of {}"),
}


def general(rng: random.Random) -> Problem:
    table = rng.choice(sorted(TABLES))
    key, value = rng.choice(TABLES[table].split(",")).split(" ")
    ask, about = (phrase.format(key.replace("_", " ")) for phrase in PHRASES[table])
    asker = rng.choice(NAMES)
    asked = rng.choice((ask, f"{asker} asks: {ask}", f"Here is a question from {asker}. {ask}"))
    return Problem(
        "general",
        asked,
        f"The question is about {about}. I know it: {value}.",
        "This is a simple question.",
        f"As far as I know, {about} is {value}.",
        f"I know that {about} is {value}.",
        value,
        table.capitalize(),
    )


KINDS: dict[str, Callable[[random.Random], Problem]] = {
    maker.__name__: maker
    for maker in (shopping, basket, sharing, clock, most, legs, weekdays, ages, general)
}
# both models learn these; no calibration set holds them
UNCALIBRATED_KINDS = ("weekdays", "ages")
