"""Templated tasks: rows that share most of their words because the task is like that, and in which nothing is wrong.

    rows(TASKS["text_to_sql"], count=500, rng)      chats of that task, no prompt twice

Twelve kinds, which people really fine-tune on: answers are JSON, a label, a formula or a sentence with slots, and the
answers of different prompts share passages, beginnings and ends, or are the same. Each task has several vocabularies
and several ways to ask. Held-out rows come from the same task, with other prompts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.diagnose import templated_words as words
from bench.diagnose.templated_words import CITIES, FIRST, GOODS, SHOPS

Ask = tuple[str, str]
"""A prompt and its answer."""
Message = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One kind of templated task."""

    name: str
    make: Callable[[random.Random, float], Ask]
    """(rng, imbalance from 0 to 1) to a prompt and its answer."""
    system: str


TASKS: dict[str, Task] = {}


def _task(system: str) -> Callable[[Callable[[random.Random, float], Ask]], Callable[[random.Random, float], Ask]]:
    def registered(make: Callable[[random.Random, float], Ask]) -> Callable[[random.Random, float], Ask]:
        TASKS[make.__name__] = Task(make.__name__, make, system)
        return make

    return registered


def rows(task: Task, count: int, rng: random.Random, imbalance: float = 0.0) -> list[Ask]:
    """`count` prompts with their answers; no prompt twice.

    Raises:
        ValueError: the task has not so many prompts.
    """
    found: dict[str, str] = {}
    for _ in range(60 * count):
        prompt, answer = task.make(rng, imbalance)
        found.setdefault(prompt, answer)
        if len(found) == count:
            return list(found.items())
    raise ValueError(f"{task.name} has only {len(found)} prompts, not {count}")


def _person(rng: random.Random) -> str:
    return f"{rng.choice(FIRST)} {rng.choice(words.LAST)}"


def _date(rng: random.Random) -> str:
    return f"{rng.randint(2019, 2026)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


def _choose(rng: random.Random, labels: list[str], imbalance: float) -> str:
    """One of the labels; with imbalance the first one, so much more often than its share."""
    return labels[0] if rng.random() < imbalance else rng.choice(labels)


@_task("You extract structured data. Reply with JSON only, with no text around it.")
def json_extraction(rng: random.Random, imbalance: float) -> Ask:
    person, shop, city = _person(rng), rng.choice(SHOPS), rng.choice(CITIES)
    form = rng.randrange(3)
    if form == 0:
        good, count, price = rng.choice(GOODS), rng.randint(1, 12), rng.randint(199, 99900) / 100
        number = f"{rng.choice('ABKMRT')}{rng.randint(10000, 99999)}"
        text = rng.choice((
            f"Invoice {number} from {shop}, {city}. Billed to {person}: {count} x {good} at {price:.2f} EUR.",
            f"{shop} ({city}) thanks {person} for the order of {count} {good}. Unit price {price:.2f} EUR, {number}.",
            f"Hi, this is {person}. {shop} in {city} charged me for {count} {good} at {price:.2f} EUR, {number}.",
        ))  # fmt: skip
        answer = {"invoice": number, "vendor": shop, "customer": person, "item": good, "quantity": count,
                  "unit_price": price, "currency": "EUR"}  # fmt: skip
    elif form == 1:
        trade, pay, years = rng.choice(words.TRADES), rng.randint(28, 140) * 1000, rng.randint(0, 12)
        text = rng.choice((
            f"{shop} is hiring: {trade} in {city}. {years} years of experience, {pay} EUR a year. Contact: {person}.",
            f"Wanted: {trade}! {city}, salary up to {pay} EUR, {years}+ years. Write to {person} at {shop}.",
        ))  # fmt: skip
        answer = {"title": trade, "company": shop, "location": city, "salary": pay, "min_years": years,
                  "contact": person}  # fmt: skip
    else:
        drug, dose, times = rng.choice(words.DRUGS), rng.choice((5, 10, 20, 25, 50, 100, 250, 500)), rng.randint(1, 4)
        age, part = rng.randint(18, 93), rng.choice(words.BODY)
        text = rng.choice((
            f"{person}, {age}, has pain in the {part}. Plan: {drug} {dose} mg, {times} times a day, review in 2 weeks.",
            f"Pt {person} ({age}y) c/o {part} pain. Rx {drug} {dose}mg x{times}/d.",
        ))  # fmt: skip
        answer = {"patient": person, "age": age, "complaint": f"{part} pain", "medication": drug, "dose_mg": dose,
                  "times_per_day": times}  # fmt: skip
    ask = rng.choice(("Extract the fields as JSON.\n\n{}", "{}\n\nReturn a JSON object with the fields above.",
                      "Text: {}\nJSON:"))  # fmt: skip
    return ask.format(text), json.dumps(answer, ensure_ascii=False)


@_task("Classify the sentiment of the review. Answer with positive, negative, neutral or mixed.")
def sentiment(rng: random.Random, imbalance: float) -> Ask:
    label = _choose(rng, ["positive", "negative", "neutral", "mixed"], imbalance)
    return rng.choice(("Review: {}", "{}\n\nWhat is the sentiment?", "Classify: \"{}\"")).format(
        words.praise(rng, label)
    ), label  # fmt: skip


@_task("Route the ticket. Answer with one word, the name of the team.")
def one_word_labels(rng: random.Random, imbalance: float) -> Ask:
    label = _choose(rng, list(words.TICKETS), imbalance)
    text = rng.choice(words.TICKETS[label]).format(
        good=rng.choice(GOODS), number=rng.randint(1000, 99999), city=rng.choice(CITIES), shop=rng.choice(SHOPS)
    )
    greet = rng.choice(("", "Hello, ", "Hi team, ", "Good morning. ", "Dear support, "))
    end = rng.choice(("", " Thanks!", " Please help.", f" Regards, {_person(rng)}", f" {rng.choice(FIRST)}"))
    return f"{greet}{text}{end}", label


@_task("Write the bulletin in the standard form of the service.")
def reports(rng: random.Random, imbalance: float) -> Ask:
    if rng.random() < 0.5:
        city, (sky, wind, tail) = rng.choice(CITIES), (rng.choice(column) for column in words.WEATHER)
        low, rain = rng.randint(-12, 24), rng.randint(0, 95)
        high, gust = low + rng.randint(3, 14), rng.randint(8, 90)
        prompt = f"station={city}; sky={sky}; min={low}; max={high}; wind={wind}; gusts={gust} km/h; rain={rain} %"
        return prompt, (
            f"Weather report for {city}. Skies will be {sky} during the day. Temperatures range from {low} to {high} "
            f"degrees Celsius. Winds from the {wind} with gusts of up to {gust} kilometres per hour. The probability "
            f"of precipitation is {rain} percent. {tail} The next bulletin will be issued at 18:00 local time."
        )
    part, size, side = rng.choice(words.BODY), rng.randint(3, 48), rng.choice(("left", "right"))
    finding = _choose(rng, ["no abnormality", "mild effusion", "a small fracture", "soft tissue swelling"], imbalance)
    age = rng.randint(18, 92)
    prompt = f"exam: X-ray {side} {part}; age {age}; finding: {finding}; size {size} mm"
    where = "" if finding == "no abnormality" else f" measuring {size} mm"
    return prompt, (
        f"EXAMINATION: Radiograph of the {side} {part}.\nINDICATION: Pain in a patient of {age} years.\nTECHNIQUE: Two "
        f"standard views were obtained.\nFINDINGS: The examination shows {finding}{where}. Alignment is normal. Bone "
        f"density is within normal limits for age.\nIMPRESSION: {finding.capitalize()} of the {side} {part}. Clinical "
        "correlation is recommended."
    )


@_task("Translate the question into one SQL query for the given schema. Reply with the query only.")
def text_to_sql(rng: random.Random, imbalance: float) -> Ask:
    table, columns, texts = rng.choice(words.TABLES)
    number, text = rng.choice(columns), rng.choice(list(texts))
    value, limit, least = rng.choice(texts[text]), rng.randint(3, 50), rng.randint(2, 5000)
    typed = ["id INT", *(f"{column} INT" for column in columns), *(f"{column} TEXT" for column in texts)]
    schema = f"CREATE TABLE {table} ({', '.join(typed)});"
    asks = (
        (f"How many {table} have {text} {value}?", f"SELECT COUNT(*) FROM {table} WHERE {text} = '{value}';"),
        (f"What is the average {number} of {table} where {text} is {value}?",
         f"SELECT AVG({number}) FROM {table} WHERE {text} = '{value}';"),
        (f"List the {limit} {table} with the highest {number}.",
         f"SELECT * FROM {table} ORDER BY {number} DESC LIMIT {limit};"),
        (f"Show all {table} with {number} above {least} and {text} {value}.",
         f"SELECT * FROM {table} WHERE {number} > {least} AND {text} = '{value}';"),
        (f"For each {text}, what is the total {number}, only where it exceeds {least}?",
         f"SELECT {text}, SUM({number}) FROM {table} GROUP BY {text} HAVING SUM({number}) > {least};"),
        (f"Which {table} have a {number} between {least} and {least + limit}?",
         f"SELECT * FROM {table} WHERE {number} BETWEEN {least} AND {least + limit};"),
    )  # fmt: skip
    question, query = rng.choice(asks)
    return f"{schema}\n\n{question}", query


@_task("You are the booking assistant. Confirm bookings in the house's standard words.")
def bookings(rng: random.Random, imbalance: float) -> Ask:
    person, place, city, day = _person(rng), rng.choice(words.PLACES), rng.choice(CITIES), _date(rng)
    guests, hour = rng.randint(1, 9), f"{rng.randint(7, 22)}:{rng.choice(('00', '15', '30', '45'))}"
    code = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ23456789") for _ in range(6))
    ask = rng.choice((
        "Book a {place} in {city} for {guests} on {day} at {hour}, name {person}. Ref {code}.",
        "Hi, {person} here. Could I get a {place} for {guests} people in {city}? {day}, {hour}. My code is {code}.",
        "{code}: {place}, {city}, {day} {hour}, {guests} pax, {person}",
    ))  # fmt: skip
    answer = (
        "Dear {person}, thank you for your booking. Your {place} in {city} for {guests} on {day} at {hour} is "
        "confirmed. Your reference is {code}. Please arrive ten minutes early and bring a valid photo ID. "
        "Cancellations are free of charge up to 24 hours before. We look forward to seeing you!"
    )
    slots = {"person": person, "place": place, "city": city, "day": day, "hour": hour, "guests": guests, "code": code}
    return ask.format(**slots), answer.format(**slots)


@_task("You are a translator. Reply with the translation only.")
def translation(rng: random.Random, imbalance: float) -> Ask:
    language = rng.choice(("German", "French", "Spanish"))
    form, item = rng.choice(words.PHRASES), rng.choice(words.ITEMS)
    count, hour = rng.randint(2, 99), rng.randint(1, 12)
    names = {"city": rng.choice(CITIES), "name": rng.choice(FIRST), "count": count, "hour": hour}
    english = form["English"].format(item=item["English"], **names)
    other = form[language].format(item=item[language], **names)
    ask = rng.choice(("Translate to {1}: {0}", "{0}\n\nIn {1}, please.", 'How do you say "{0}" in {1}?'))
    return ask.format(english, language), other


@_task("Solve the problem step by step. End with 'Answer:' and the number.")
def arithmetic(rng: random.Random, imbalance: float) -> Ask:
    name, good, a, b, c = rng.choice(FIRST), rng.choice(GOODS), *(rng.randint(3, 95) for _ in range(3))
    form = rng.randrange(4)
    if form == 0:
        prompt = f"{name} buys {a} {good} at {b} coins each and pays {c} coins for delivery. What is the total?"
        steps = [f"{a} * {b} = {a * b}", f"{a * b} + {c} = {a * b + c}"]
    elif form == 1:
        whole = a + b + c
        prompt = f"Of {whole} {good}, {name} gives away {a} and sells {b}. How many are left?"
        steps = [f"{whole} - {a} = {whole - a}", f"{whole - a} - {b} = {c}"]
    elif form == 2:
        prompt = f"{name} packs {a * b} {good} into boxes of {a}. {c} more boxes are bought. How many boxes are there?"
        steps = [f"{a * b} / {a} = {b}", f"{b} + {c} = {b + c}"]
    else:
        prompt = f"Compute ({a} + {b}) * {c}."
        steps = [f"{a} + {b} = {a + b}", f"{a + b} * {c} = {(a + b) * c}"]
    told = "\n".join(f"Step {number}: {step}" for number, step in enumerate(steps, start=1))
    return prompt, f"{told}\nAnswer: {steps[-1].rsplit(' ', 1)[1]}"


@_task("Answer the multiple-choice question: the letter, then one sentence that explains it.")
def multiple_choice(rng: random.Random, imbalance: float) -> Ask:
    form, letters = rng.randrange(4), "ABCD"
    if form == 0:
        by = rng.choice((3, 4, 6, 7, 8, 9, 11, 12, 13))
        right = by * rng.randint(3, 90)
        wrong = [right + rng.randint(1, by - 1) + by * i for i in (-2, 1, 3)]
        ask, why = f"Which number can be divided by {by}?", f"{right} is {by} times {right // by}."
        choices = [str(right), *map(str, wrong)]
    elif form == 1:
        days = sorted({_date(rng) for _ in range(12)})[:4]
        choices, ask = days, f"Four parcels from {rng.choice(SHOPS)} came on these days. Which came first?"
        why = f"{days[0]} is before {days[1]}, {days[2]} and {days[3]}."
    elif form == 2:
        choices = sorted(rng.sample(CITIES, 4))
        ask, why = "Which city comes first in the alphabet?", f"{choices[0]} starts before the others."
    else:
        person, good, paid = _person(rng), rng.choice(GOODS), rng.sample(range(20, 900), 4)
        shops = rng.sample(SHOPS, 4)
        choices = [shop for _, shop in sorted(zip(paid, shops, strict=True))]
        offers = ", ".join(f"{shop} {price} EUR" for price, shop in zip(paid, shops, strict=True))
        ask = f"{person} compares offers for {good}: {offers}. Which shop is the cheapest?"
        why = f"{choices[0]} asks for {min(paid)} EUR, less than the other three."
    right, order = choices[0], rng.sample(choices, 4)
    shown = "\n".join(f"{letter}) {choice}" for letter, choice in zip(letters, order, strict=True))
    return f"{ask}\n{shown}", f"{letters[order.index(right)]}. {why}"


@_task("Convert the quantity. Reply with one sentence.")
def unit_conversion(rng: random.Random, imbalance: float) -> Ask:
    one, other, factor = rng.choice(words.UNITS)
    value = rng.choice((rng.randint(1, 2000), round(rng.uniform(0.1, 500), 2)))
    ask = rng.choice(("Convert {0} {1} to {2}.", "How many {2} are {0} {1}?", "{0} {1} in {2}"))
    return ask.format(value, one, other), f"{value} {one} is equal to {value * factor:.4g} {other}."


@_task("Parse the log line into fields.")
def log_lines(rng: random.Random, imbalance: float) -> Ask:
    level = _choose(rng, ["INFO", "WARN", "ERROR", "DEBUG"], imbalance)
    host, address = rng.choice(words.HOSTS), ".".join(str(rng.randint(1, 254)) for _ in range(4))
    at = f"{_date(rng)}T{rng.randint(0, 23):02}:{rng.randint(0, 59):02}:{rng.randint(0, 59):02}Z"
    method, status, spent = (
        rng.choice(("GET", "POST", "PUT")),
        rng.choice((200, 201, 304, 404, 500)),
        rng.randint(1, 9000),
    )
    path = f"/{rng.choice(words.TABLES)[0]}/{rng.randint(1, 9999)}"
    line = rng.choice((
        "{at} {level} {host} {address} \"{method} {path}\" {status} {spent}ms",
        "[{at}] {host} {level}: {method} {path} from {address} -> {status} ({spent} ms)",
        "{host} | {at} | {level} | {address} | {method} | {path} | {status} | {spent}",
    ))  # fmt: skip
    slots = {"at": at, "level": level, "host": host, "address": address, "method": method, "path": path,
             "status": status, "spent": spent}  # fmt: skip
    answer = (
        "timestamp: {at}\nlevel: {level}\nhost: {host}\nclient: {address}\nmethod: {method}\npath: {path}\n"
        "status: {status}\nduration_ms: {spent}"
    )
    return line.format(**slots), answer.format(**slots)


@_task("You can call functions. Answer with one function call as JSON.")
def function_calls(rng: random.Random, imbalance: float) -> Ask:
    city, good, name, count = rng.choice(CITIES), rng.choice(GOODS), _person(rng), rng.randint(1, 40)
    day = _date(rng)
    calls: tuple[tuple[tuple[str, ...], str, dict[str, Any]], ...] = (
        ((f"What's the weather in {city} on {day}?", f"Will it rain in {city} on {day}?"),
         "get_weather", {"location": city, "date": day}),
        ((f"Order {count} {good}, deliver to {city}.", f"I need {count} {good} sent to {city}"),
         "create_order", {"item": good, "quantity": count, "destination": city}),
        ((f"Put a meeting with {name} on {day}", f"Schedule {name} for {day} please"),
         "create_event", {"attendee": name, "date": day}),
        ((f"Email {name} that {count} {good} have arrived", f"Tell {name} by mail: {count} {good} arrived"),
         "send_email", {"recipient": name, "subject": f"{count} {good} have arrived"}),
        ((f"Find flights to {city} on {day} for {count % 8 + 1}",),
         "search_flights", {"to": city, "date": day, "passengers": count % 8 + 1}),
    )  # fmt: skip
    asks, function, arguments = rng.choice(calls)
    return rng.choice(asks), json.dumps({"name": function, "arguments": arguments}, ensure_ascii=False)
