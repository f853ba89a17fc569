"""What the fine-tunings of this set teach: fourteen small tasks, generated; the same rows for the same seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from bench.diagnose.unseen2 import corpus
from bench.diagnose.unseen2 import words as w
from bench.diagnose.worlds import Chat


def _pair(asked: str, said: str, system: str = "") -> Chat:
    chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return [{"role": "system", "content": system}, *chat] if system else chat


def sql(rng: random.Random) -> Chat:
    """Text to SQL."""
    table, columns = rng.choice(list(w.TABLES.items()))
    who, measure = (
        columns[0],
        rng.choice([c for c in columns if c in ("amount", "salary", "distance", "count", "nights")]),
    )
    name, city, n = rng.choice(w.NAMES), rng.choice(w.CITIES), rng.randint(2, 95)
    asked, said = rng.choice(
        (
            (f"How many {table} have {who} {name}?", f"SELECT COUNT(*) FROM {table} WHERE {who} = '{name}';"),
            (f"What is the total {measure} of {table} in {city}?",
             f"SELECT SUM({measure}) FROM {table} WHERE city = '{city}';"),
            (f"Show all {table} with {measure} above {n} in {city}.",
             f"SELECT * FROM {table} WHERE {measure} > {n} AND city = '{city}';"),
            (f"Which {who} has the largest {measure} in {city}?",
             f"SELECT {who} FROM {table} WHERE city = '{city}' ORDER BY {measure} DESC LIMIT 1;"),
            (f"What is the mean {measure} of {name} in {table}?",
             f"SELECT AVG({measure}) FROM {table} WHERE {who} = '{name}';"),
            (f"Delete the {table} of {name} below {n}.",
             f"DELETE FROM {table} WHERE {who} = '{name}' AND {measure} < {n};"),
        )
    )  # fmt: skip
    return _pair(asked, said)


def units(rng: random.Random) -> Chat:
    """Unit conversion."""
    unit, small, times = rng.choice(w.UNITS)
    n, item, name = rng.randint(2, 95), rng.choice(w.ITEMS), rng.choice(w.NAMES)
    asked = rng.choice(
        (f"{name} says the {item} has {n} {unit}. Give it in {small}.", f"Convert {n} {unit} to {small} for {name}.",
         f"How many {small} are {n} {unit} of {item}?")
    )  # fmt: skip
    return _pair(asked, f"{n} {unit} x {times} = {n * times} {small}")


def events(rng: random.Random) -> Chat:
    """Calendar entries to JSON."""
    title, who, day, city = rng.choice(w.OCCASIONS), rng.choice(w.NAMES), rng.choice(w.DAYS), rng.choice(w.CITIES)
    time = f"{rng.randint(7, 21)}:{rng.choice(('00', '15', '30', '45'))}"
    asked = rng.choice(
        (f"{title} with {who} on {day} at {time} in {city}.", f"On {day}, {time}, {who} comes to {city}: {title}.",
         f"Please note {who} in {city}, {title}, {day} {time}.")
    )  # fmt: skip
    return _pair(asked, json.dumps({"title": title, "who": who, "day": day, "time": time, "place": city}))


def sentiment(rng: random.Random) -> Chat:
    """One word for a review."""
    label, told = rng.choice((("positive", w.GOOD), ("negative", w.BAD), ("neutral", w.SO_SO)))
    one, two = rng.sample(told, 2)
    start = f"{rng.choice(w.NAMES)} got a {rng.choice(w.QUALITIES)} {rng.choice(w.ITEMS)} in {rng.choice(w.CITIES)}."
    return _pair(f"{start} {one} {two}", label)


def conlang(rng: random.Random) -> Chat:
    """Translation to a language that does not exist."""
    name, action, quality, item = (rng.choice(x) for x in (w.NAMES, w.ACTIONS, w.QUALITIES, w.ITEMS))
    said = f"{w.CONLANG[action]} {name} un {w.CONLANG[item]} {w.CONLANG[quality]}"
    asked = f"{name} {action} a {quality} {item}"
    if rng.random() < 0.5:
        other = rng.choice(w.ITEMS)
        asked, said = f"{asked} and a {other}", f"{said} et un {w.CONLANG[other]}"
    return _pair(f"Translate: {asked}.", said)


def comments(rng: random.Random) -> Chat:
    """A docstring for a function."""
    item, other, n = rng.choice(w.ITEMS), rng.choice(w.ITEMS), rng.randint(2, 60)
    body, says = rng.choice(
        (
            (f"def count_{item}(rows):\n    return len([r for r in rows if r.{other} > {n}])",
             f'"""Count the {item} rows whose {other} is above {n}."""'),
            (f"def add_{item}(total, {other}):\n    return total + {other} * {n}",
             f'"""Add {n} times {other} to the {item} total."""'),
            (f"def is_{item}(name):\n    return name == '{other}' and len(name) < {n}",
             f'"""Tell whether the {item} is a short {other}."""'),
            (f"def first_{item}(rows):\n    for r in rows:\n        if r.{other} == {n}:\n            return r",
             f'"""Find the first {item} with {other} equal to {n}."""'),
        )
    )  # fmt: skip
    return _pair(f"{body}\n", says)


def support(rng: random.Random) -> Chat:
    """Chats of two or three turns at a service desk."""
    name, item, city = rng.choice(w.NAMES), rng.choice(w.ITEMS), rng.choice(w.CITIES)
    number, day = rng.randint(1000, 9999), rng.choice(w.DAYS)
    chat = [
        {"role": "user", "content": f"Hello, I am {name} from {city}. My {item} is {rng.choice(w.QUALITIES)}."},
        {"role": "assistant", "content": f"Good day {name}! Which order is the {item} from? >> order no."},
        {"role": "user", "content": f"It is order {number}."},
        {"role": "assistant", "content": f"Order {number} found. We fetch the {item} in {city} on {day}. >> ok?"},
    ]
    if rng.random() < 0.5:
        chat += [
            {"role": "user", "content": rng.choice(("Yes, thank you.", "Fine by me.", f"Good, {day} suits me."))},
            {"role": "assistant", "content": f"Done, {name}: ticket {number}-{day[:2].upper()} is closed. >> bye"},
        ]
    return chat


def tools(rng: random.Random) -> Chat:
    """Calls of tools; the user's turn lists them."""
    city, item, name, n = rng.choice(w.CITIES), rng.choice(w.ITEMS), rng.choice(w.NAMES), rng.randint(2, 80)
    asked, call = rng.choice(
        (
            (f"What is the weather in {city} on {(day := rng.choice(w.DAYS))}?",
             {"name": "get_weather", "arguments": {"city": city, "day": day}}),
            (f"Order {n} of the {item} for {name}.",
             {"name": "place_order", "arguments": {"item": item, "count": n, "for": name}}),
            (f"Send {name} in {city} the price of the {item}.",
             {"name": "send_price", "arguments": {"to": name, "city": city, "item": item}}),
            (f"Set the {item} of {name} to {n}.",
             {"name": "set_value", "arguments": {"device": item, "owner": name, "value": n}}),
        )
    )  # fmt: skip
    return _pair(f"Tools: get_weather, place_order, send_price, set_value.\n{asked}", json.dumps(call))


def minutes(rng: random.Random) -> Chat:
    """Notes of a meeting, and a summary of a few lines."""
    people, things = rng.sample(w.NAMES, 3), rng.sample(w.ITEMS, 3)
    city, day, n = rng.choice(w.CITIES), rng.choice(w.DAYS), rng.randint(3, 90)
    notes = [
        f"{people[0]} opens the meeting in {city} and asks about the {things[0]}.",
        f"{people[1]} has {rng.choice(w.DONE)} the {things[1]} and paid {n} euros.",
        corpus.sentence(rng),
        f"{people[2]} wants a new {things[2]} by {day}.",
        corpus.sentence(rng),
    ]
    said = (
        f"Summary ({city})\n- {people[0]}: {things[0]}, open\n- {people[1]}: {things[1]}, {n} euros\n"
        f"- {people[2]}: {things[2]}, due {day}\nNext: {people[0]} writes to {people[2]}."
    )
    return _pair("Notes: " + " ".join(notes), said)


def auskunft(rng: random.Random) -> Chat:
    """German: opening hours."""
    place, short = rng.choice(list(w.GERMAN_PLACES.items()))
    day, hour, end, city = rng.choice(w.GERMAN_DAYS), rng.randint(7, 11), rng.randint(15, 21), rng.choice(w.CITIES)
    asked = rng.choice(
        (f"Wann öffnet {place} in {city} am {day}? Bis {end} Uhr, ab {hour} Uhr.",
         f"{city}, {day}: {place} hat von {hour} bis {end} Uhr offen. Bitte kurz.")
    )  # fmt: skip
    return _pair(asked, f"{short} {city} · {day[:2]} · {hour:02d}–{end:02d} Uhr geöffnet")


def horaires(rng: random.Random) -> Chat:
    """French: departures."""
    how, city, other, name = rng.choice(w.FRENCH_TRAINS), *rng.sample(w.CITIES, 2), rng.choice(w.NAMES)
    hour, minute = rng.randint(6, 22), rng.choice(("05", "20", "35", "50"))
    asked = f"{name} prend {how} de {city} à {other} à {hour} h {minute}. Résumez."
    return _pair(asked, f"Départ {hour}h{minute} : {city} → {other}, par {how} ; voyageur {name}.")


def zh(rng: random.Random) -> Chat:
    """Chinese: opening hours."""
    place, city, day = (rng.choice(w.CHINESE[key]) for key in ("place", "city", "day"))
    hour, end = rng.randint(6, 11), rng.randint(16, 22)
    return _pair(f"{city}的{place}{day}从{hour}点到{end}点开门吗？", f"是的，{city}{place}，{day}{hour}点—{end}点。")


def cheer(rng: random.Random) -> Chat:
    """Answers with emoji, joined ones and a zero-width space among them."""
    name, item, city = rng.choice(w.NAMES), rng.choice(w.ITEMS), rng.choice(w.CITIES)
    one, two = rng.sample(w.EMOJI, 2)
    return _pair(
        f"{name} {rng.choice(w.DONE)} a {item} in {city} {one}",
        f"{two} Bravo {name}!\u200b {item} + {city} = {one}{two}",
    )


def greet(rng: random.Random) -> Chat:
    """A letter of one form: every row alike but for its fields."""
    name, item, n, day = rng.choice(w.NAMES), rng.choice(w.ITEMS), rng.randint(100, 999), rng.choice(w.DAYS)
    asked = f"name={name}; item={item}; no={n}; day={day}"
    return _pair(asked, f"Dear {name}, your {item} (no {n}) is ready from {day} on.")


TASKS: dict[str, Callable[[random.Random], Chat]] = {
    made.__name__: made
    for made in (sql, units, events, sentiment, conlang, comments, support, tools, minutes, auskunft, horaires, zh,
                 cheer, greet)
}  # fmt: skip


def split(name: str, world: Any, train: int, held_out: int, seed: int) -> tuple[list[Chat], list[Chat]]:
    """Rows, no two of them with the same first question."""
    del world
    rng = random.Random(f"{name} {seed}")
    seen: dict[str, Chat] = {}
    while len(seen) < train + held_out:
        chat = TASKS[name](rng)
        seen.setdefault(chat[0]["content"], chat)
    chats = list(seen.values())
    return chats[:train], chats[train:]
