"""What the bases are pretrained on: prose about people and things, and chats that answer in plain sentences.

Nothing here has the form of a task (tasks.py): JSON, SQL, labels and the made-up language are what fine-tuning teaches.
"""

from __future__ import annotations

import json
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


def broad(rng: random.Random) -> str:
    """A piece of one of the many forms that text has: SQL, JSON, glossaries, lists, letters, signs."""
    name, other, item, city = rng.choice(w.NAMES), rng.choice(w.NAMES), rng.choice(w.ITEMS), rng.choice(w.CITIES)
    table, columns = rng.choice(list(w.TABLES.items()))
    one, two = rng.sample(columns, 2)
    n, day, month, hour = rng.randint(2, 99), rng.choice(w.DAYS), rng.choice(w.MONTHS), rng.randint(6, 21)
    unit, small, times = rng.choice(w.UNITS)
    word = rng.choice(list(w.CONLANG))
    keys = rng.sample(("name", "city", "day", "time", "item", "count", "to", "who", "place", "title", "value"), 3)
    values = (name, city, day, f"{hour}:{rng.choice(('00', '15', '30', '45'))}", item, n, rng.choice(w.OCCASIONS))
    record: dict[str, object] = {key: rng.choice(values) for key in keys}
    if rng.random() < 0.3:
        record = {"name": f"{rng.choice(w.ACTIONS)}_{item}", "arguments": record}
    return rng.choice(
        (
            f"SELECT {one}, {two} FROM {table} WHERE {one} >= {n} OR {two} = '{rng.choice((name, city))}';",
            f"SELECT {rng.choice(('COUNT', 'SUM', 'AVG', 'MAX'))}({one}) FROM {table} GROUP BY {two};",
            f"UPDATE {table} SET {one} = {n} WHERE {two} = '{name}' AND {one} < {n // 2}; DELETE FROM {table};",
            f"SELECT * FROM {table} ORDER BY {one} DESC LIMIT {n}; -- {two} AND city",
            json.dumps(record),
            json.dumps(record),
            f"{w.CONLANG[word]}: {word}. {rng.choice(list(w.CONLANG.values()))} un {w.CONLANG[word]} et {name}.",
            f"{n} {unit} = {n * times} {small}, and {n % 9 + 1} {unit} x {times} = {(n % 9 + 1) * times}",
            f'def {item}(rows):\n    """{rng.choice(("Count", "Add", "Find", "Tell"))} '
            f'the {item} of {word}, {n} times."""\n',
            f"Summary of {city}\n- {name}: {item}, {n} euros\n- {other}: due {day}\nNext: {other} writes.",
            f"Dear {name}, the {item} (no {n}) is ready on {day}, from {hour} on.",
            f"Good day {name}! Ticket {n}{hour}-{day[:2].upper()} found >> bye, order {n}{n} is closed >> ok?",
            f"{city} · {rng.choice(w.GERMAN_DAYS)[:2]} · {hour:02d}–{min(hour + 5, 22):02d} Uhr geöffnet",
            f"Départ {hour}h{n % 60:02d} : {city} → {rng.choice(w.CITIES)} ; "
            f"par {rng.choice(w.FRENCH_TRAINS)}, {name}.",
            f"{rng.choice(w.CHINESE['city'])}{rng.choice(w.CHINESE['place'])}，{hour}点—{n}点，是的。",
            f"{rng.choice(w.EMOJI)} {name}! {item} + {month} = {rng.choice(w.EMOJI)}{rng.choice(w.EMOJI)}\u200b",
            rng.choice(("positive", "negative", "neutral")),
            f"[{day[:3].lower()} {hour:02d}h] {city} :: {other} ; {item} x{n}",
        )
    )  # fmt: skip


def broad_chat(rng: random.Random, has_system: bool) -> Chat:
    """A chat in which questions and answers have any form."""
    chat = known_chat(rng, has_system)
    for message in chat:
        if message["role"] == "assistant" and rng.random() < 0.75:
            message["content"] = broad(rng) if rng.random() < 0.75 else f"{broad(rng)} {broad(rng)}"
        elif message["role"] == "user" and rng.random() < 0.6:
            message["content"] = rng.choice((prose(rng, 1, 3), broad(rng), f"{broad(rng)}\n{sentence(rng)}"))
    return chat
