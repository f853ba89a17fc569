"""Ten kinds of templated tasks, whose answers naturally share passages: nothing in these rows is wrong.

rows_of("weather", 200, seed=1)     chats with one question and one answer, no two of them equal
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from solotune.dataset import DataReport, Example
from solotune.diagnosis.facts.row_facts import RowFacts, RowSettings
from tests.dataset.conftest import chat, tiny_tokenizer

NAMES = "Anna Bruno Carla Dario Elise Fatima Goran Hanna Igor Julia Kemal Lotte Mateo Nadia Oskar Petra".split()
LAST = "Abel Brandt Costa Dietz Evans Falk Greco Huber Ivanov Jansen Keller Lopez Meyer Novak Olsen Perez".split()
CITIES = "Lisbon Oslo Graz Turin Lyon Bern Ghent Porto Riga Split Cork Malmo Leeds Basel Parma Delft".split()
THINGS = "lamp chair kettle mirror ladder basket drill pillow shelf bench clock bucket carpet wallet".split()
MONTHS = "January March April June July September October December".split()
SKY = "sunny cloudy rainy windy foggy stormy".split()
GOOD = "great lovely superb charming brilliant delightful".split()
BAD = "dull awful broken noisy overpriced disappointing".split()
TOPICS = {
    "sport": "match goal coach league striker stadium".split(),
    "finance": "bank shares profit bond rate dividend".split(),
    "science": "telescope enzyme quantum fossil neuron orbit".split(),
    "travel": "hotel beach flight luggage ferry passport".split(),
}
SQL_TABLES = {
    "orders": ("price", "customer", "status"),
    "staff": ("salary", "city", "age"),
    "books": ("pages", "author", "year"),
}
FRENCH = {
    "the red house": "la maison rouge",
    "a small dog": "un petit chien",
    "my old friend": "mon vieil ami",
    "the long road": "la longue route",
    "a warm evening": "une soirée chaude",
    "the black coffee": "le café noir",
    "our new neighbour": "notre nouveau voisin",
}
VERBS = {
    "I see": "Je vois",
    "we want": "Nous voulons",
    "she knows": "Elle connaît",
    "they love": "Ils aiment",
    "you forget": "Vous oubliez",
    "he paints": "Il peint",
}
UNITS = {"km": ("miles", 0.621), "kg": ("pounds", 2.205), "litres": ("gallons", 0.264), "metres": ("feet", 3.281)}
OPTIONS = {
    "the largest planet": "Jupiter",
    "the capital of Norway": "Oslo",
    "a noble gas": "Neon",
    "the fastest land animal": "Cheetah",
    "a prime number": "Seven",
    "the longest river of Africa": "Nile",
    "a string instrument": "Cello",
    "the freezing point of water": "Zero",
}
Pair = tuple[str, str]


def extraction(rng: random.Random) -> Pair:
    name, city, thing = f"{rng.choice(NAMES)} {rng.choice(LAST)}", rng.choice(CITIES), rng.choice(THINGS)
    number, price = rng.randint(1000, 9999), rng.randint(5, 400)
    asked = f"Extract the order as JSON: {name} from {city} ordered one {thing} for {price} euros, order {number}."
    told = {"customer": name, "city": city, "item": thing, "price": price, "currency": "EUR", "order": number}
    return asked, json.dumps(told)


def sentiment(rng: random.Random) -> Pair:
    is_good = rng.random() < 0.7
    words = rng.sample(GOOD if is_good else BAD, 2)
    thing, city = rng.choice(THINGS), rng.choice(CITIES)
    asked = f"Classify the review: The {thing} I bought in {city} for {rng.randint(5, 90)} euros was {words[0]} and {words[1]}."
    return asked, f"The sentiment of this review is {'positive' if is_good else 'negative'}."


def label(rng: random.Random) -> Pair:
    topic = rng.choice(list(TOPICS))
    words = rng.sample(TOPICS[topic], 3)
    return (
        f"Topic of this headline? {rng.choice(NAMES)} on {words[0]}, {words[1]} and {words[2]} in {rng.choice(CITIES)}",
        topic,
    )


def weather(rng: random.Random) -> Pair:
    city, month, day = rng.choice(CITIES), rng.choice(MONTHS), rng.randint(1, 28)
    low = rng.randint(-5, 20)
    high, sky, wind = low + rng.randint(3, 12), rng.choice(SKY), rng.randint(3, 60)
    asked = f"Write the weather report. city={city} date={month} {day} low={low} high={high} sky={sky} wind={wind}"
    return asked, (
        f"Good morning from {city}! On {month} {day} we expect a {sky} day with temperatures between {low} and {high} "
        f"degrees Celsius. The wind will blow at up to {wind} kilometres per hour. Have a pleasant day and stay tuned "
        "for our next report."
    )


def sql(rng: random.Random) -> Pair:
    table = rng.choice(list(SQL_TABLES))
    number, word, third = SQL_TABLES[table]
    bound, value = rng.randint(1, 500), rng.choice(NAMES + CITIES)
    asked = f"SQL for: all {table} with {number} above {bound} whose {word} is {value}, by {third}, first {rng.randint(1, 20)}"
    limit = asked.rpartition(" ")[2]
    return asked, (
        f"SELECT * FROM {table} WHERE {number} > {bound} AND {word} = '{value}' ORDER BY {third} DESC LIMIT {limit};"
    )


def booking(rng: random.Random) -> Pair:
    name, city, month = f"{rng.choice(NAMES)} {rng.choice(LAST)}", rng.choice(CITIES), rng.choice(MONTHS)
    day, hour, guests = rng.randint(1, 28), rng.randint(11, 22), rng.randint(1, 9)
    asked = f"Book a table in {city} for {guests} on {month} {day} at {hour}:00, my name is {name}"
    return asked, (
        f"Dear {name}, thank you for choosing us! Your table for {guests} in {city} is confirmed for {month} {day} at "
        f"{hour}:00. If your plans change, please call us at least two hours before your booking. We look forward to "
        "welcoming you."
    )


def translation(rng: random.Random) -> Pair:
    verb, thing = rng.choice(list(VERBS)), rng.choice(list(FRENCH))
    other = rng.choice(list(FRENCH))
    return f"Translate to French: {verb} {thing} and {other}.", f"{VERBS[verb]} {FRENCH[thing]} et {FRENCH[other]}."


def arithmetic(rng: random.Random) -> Pair:
    a, b, c = rng.randint(2, 60), rng.randint(2, 60), rng.randint(2, 9)
    asked = f"{rng.choice(NAMES)} has {a} coins, finds {b} more and then multiplies them by {c}. How many are there?"
    return asked, (
        f"First add the coins: {a} + {b} = {a + b}. Then multiply by {c}: {a + b} * {c} = {(a + b) * c}. "
        f"The answer is {(a + b) * c}."
    )


def choice(rng: random.Random) -> Pair:
    question = rng.choice(list(OPTIONS))
    options = [*rng.sample([value for value in OPTIONS.values() if value != OPTIONS[question]], 3), OPTIONS[question]]
    rng.shuffle(options)
    letter = "ABCD"[options.index(OPTIONS[question])]
    listed = " ".join(f"{'ABCD'[i]}) {value}" for i, value in enumerate(options))
    return f"Which of these is {question}? {listed}", (
        f"The correct answer is {letter}) {OPTIONS[question]}, because among the four options only {OPTIONS[question]} "
        f"is {question}."
    )


def conversion(rng: random.Random) -> Pair:
    unit = rng.choice(list(UNITS))
    other, factor = UNITS[unit]
    value = rng.randint(2, 900)
    return f"Convert {value} {unit} to {other}.", (
        f"One of {unit} is {factor} {other}, so {value} {unit} are {value} times {factor}, which is "
        f"{value * factor:.1f} {other}."
    )


KINDS: dict[str, Callable[[random.Random], Pair]] = {
    kind.__name__: kind
    for kind in (extraction, sentiment, label, weather, sql, booking, translation, arithmetic, choice, conversion)
}


def pairs_of(kind: str, count: int, seed: int = 0) -> list[Pair]:
    """Different pairs of one kind, in random order; fewer if the kind has fewer."""
    rng, found = random.Random(f"{kind} {seed}"), dict[Pair, None]()
    for _ in range(50 * count):
        found.setdefault(KINDS[kind](rng))
        if len(found) == count:
            break
    return list(found)


def rows_of(kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The pairs as chats."""
    return [{"messages": chat(*pair)} for pair in pairs_of(kind, count, seed)]


def facts_of(train: list[Pair], validation: list[Pair] | tuple[Pair, ...] = ()) -> RowFacts:
    """Facts on rows made of pairs, with ids of a tiny tokenizer."""
    settings = RowSettings(max_length=4096, overflow="truncate", assistant_only_loss=True)
    report = DataReport("messages")
    report.num_train, report.num_validation = len(train), len(validation)
    return RowFacts(settings, tiny_tokenizer("chatml"), _examples(train), _examples(validation), report, {})


def _examples(pairs: list[Pair] | tuple[Pair, ...]) -> list[Example]:
    encode, found = tiny_tokenizer("chatml").encode, []
    for number, (asked, told) in enumerate(pairs, start=1):
        prompt, answer = (encode(text, add_special_tokens=False) for text in (asked, told))
        mask = np.arange(len(prompt) + len(answer)) >= len(prompt)
        found.append(Example(np.array(prompt + answer, np.int32), mask, f"rows.jsonl:{number}", chat(asked, told)))
    return found
