"""What the bases are pretrained on: prose about people and things, and chats that answer in plain sentences.

Nothing here has the form of a task (tasks.py): JSON, SQL, labels and the made-up language are what fine-tuning teaches.
"""

from __future__ import annotations

import random

from bench.diagnose.unseen2 import words as w
from bench.diagnose.worlds import Chat


def sentence(rng: random.Random) -> str:
    """One statement."""
    name, other, item = rng.choice(w.NAMES), rng.choice(w.NAMES), rng.choice(w.ITEMS)
    quality, city, day = rng.choice(w.QUALITIES), rng.choice(w.CITIES), rng.choice(w.DAYS)
    at = rng.randrange(len(w.ACTIONS))
    return rng.choice(
        (
            f"{name} {w.ACTIONS[at]} a {quality} {item} in {city}.",
            f"On {day} {name} {w.DONE[at]} the {item} of {other}.",
            f"The {item} is {quality}, and {name} likes it.",
            f"In {rng.choice(w.MONTHS)} the {item} costs {rng.randint(2, 98)} euros in {city}.",
            f"{name} and {other} meet in {city} at {rng.randint(8, 20)}:{rng.choice(('00', '15', '30', '45'))}.",
            f'"Where is my {item}?" asks {name}; {other} has {w.DONE[at]} it.',
        )
    )


def prose(rng: random.Random, low: int = 3, high: int = 8) -> str:
    return " ".join(sentence(rng) for _ in range(rng.randint(low, high)))


def foreign(rng: random.Random) -> str:
    """Short texts in the languages of some tasks."""
    hour, minute = rng.randint(7, 21), rng.choice(("00", "15", "30"))
    name, city = rng.choice(w.NAMES), rng.choice(w.CITIES)
    place, day = rng.choice(list(w.GERMAN_PLACES)), rng.choice(w.GERMAN_DAYS)
    return rng.choice(
        (
            f"Am {day} öffnet {place} um {hour}:{minute} Uhr. {name} wartet in {city} vor der Tür.",
            f"{name} prend {rng.choice(w.FRENCH_TRAINS)} de {hour} h {minute} pour {city}. Il arrive à l'heure.",
            f"{rng.choice(w.CHINESE['city'])}的{rng.choice(w.CHINESE['place'])}在{rng.choice(w.CHINESE['day'])}"
            f"{rng.randint(7, 11)}点开门。",
        )
    )


def code(rng: random.Random) -> str:
    """A function of a few lines."""
    item, other = rng.sample(w.ITEMS, 2)
    n = rng.randint(2, 60)
    return rng.choice(
        (
            f"def count_{item}(rows):\n    return len([r for r in rows if r.kind == '{item}'])\n",
            f"def add_{item}(total, price):\n    return total + price * {n}\n",
            f"def is_{item}(name):\n    return name == '{item}' or name == '{other}'\n",
            f"def first_{item}(rows):\n    for r in rows:\n        if r.{item} > {n}:\n            return r\n",
        )
    )


def known_chat(rng: random.Random, has_system: bool) -> Chat:
    """A chat as the base model answers it."""
    chat: Chat = []
    if has_system and rng.random() < 0.35:
        chat.append({"role": "system", "content": rng.choice((
            "You are a helpful assistant.", "Answer in one sentence.",
            f"You work for a shop in {rng.choice(w.CITIES)}.",
        ))})  # fmt: skip
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        asked, said = _exchange(rng)
        chat += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return chat


def _exchange(rng: random.Random) -> tuple[str, str]:
    name, item, city = rng.choice(w.NAMES), rng.choice(w.ITEMS), rng.choice(w.CITIES)
    quality, day, month = rng.choice(w.QUALITIES), rng.choice(w.DAYS), rng.choice(w.MONTHS)
    at, n = rng.randrange(len(w.ACTIONS)), rng.randint(2, 99)
    occasion = rng.choice(w.OCCASIONS)
    unit, small, times = rng.choice(w.UNITS)
    told = rng.choice((rng.choice(w.GOOD), rng.choice(w.BAD), rng.choice(w.SO_SO)))
    return rng.choice(
        (
            (f"Who {w.DONE[at]} the {item} in {city}? It was {name}.", f"{name} {w.DONE[at]} the {item} in {city}."),
            (f"My {item} is {quality}. What do you say?", f"A {quality} {item} is a fine thing to have."),
            (f"Repeat: {name} {w.ACTIONS[at]} a {quality} {item}.", f"{name} {w.ACTIONS[at]} a {quality} {item}."),
            (f"{occasion} with {name} on {day} in {city} at {n % 12 + 8}:30.",
             f"Noted: on {day} you have {occasion.lower()} with {name} in {city}, at {n % 12 + 8}:30."),
            (f"How many {item}s were sold in {month}?", f"In {month}, {n} of the {item}s were sold."),
            (f"What is {n} {unit} in {small}?", f"There are {times} {small} in one {unit}, so it is {n} times that."),
            (f"I have a {item} now. {told}", f"Thank you for telling me about the {item}."),
            (f"What does this do?\n{code(rng)}", f"It is a function about the {item}, I think."),
            (f"Tell me about {city}. {foreign(rng)}", f"{city} is a town where {name} {w.ACTIONS[at]} things."),
            (f"Name two things for {name}.", f"A {quality} {item} and a {rng.choice(w.ITEMS)}."),
        )
    )  # fmt: skip
