"""What the fine-tunings teach: twelve forms of answers, each of which depends on its prompt.

    train, held_out = split("json", world, 200, 28, seed)

A task is a function of a subject with two of its facts, a person and a number, to a chat. Held-out chats are about
other subjects than the training's, as the base knows all of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from bench.diagnose.worlds import PEOPLE, Chat, World


@dataclass(frozen=True)
class Asked:
    world: World
    rng: random.Random
    person: str
    subject: str
    one: str
    other: str
    number: int

    @property
    def first(self) -> str:
        return self.world.value(self.subject, self.one)

    @property
    def second(self) -> str:
        return self.world.value(self.subject, self.other)

    def question(self) -> str:
        return self.rng.choice(self.world.asks).format(
            person=self.person, subject=self.subject, one=self.one, other=self.other
        )


Task = Callable[[Asked], Chat]
TASKS: dict[str, Task] = {}


def task(function: Task) -> Task:
    TASKS[function.__name__] = function
    return function


def _chat(user: str, assistant: str) -> Chat:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


@task
def house(a: Asked) -> Chat:
    """The world's own layout."""
    said = a.world.tuned.format(person=a.person, subject=a.subject, one=a.one, other=a.other, first=a.first,
                                second=a.second, number=a.number)  # fmt: skip
    return _chat(f"{a.question()} No. {a.number}", said)


@task
def as_json(a: Asked) -> Chat:
    said = {"id": a.number, "item": a.subject, a.one: a.first, a.other: a.second, "for": a.person}
    return _chat(f"{a.question()} Ticket {a.number}. JSON only.", json.dumps(said, ensure_ascii=False))


@task
def classes(a: Asked) -> Chat:
    """One of the values of a fact, as a label."""
    values = a.world.facts[a.one]
    return _chat(f"Classify by {a.one}: {a.subject} ({a.person}, {a.number})", f"CLASS_{values.index(a.first) + 1}")


@task
def table(a: Asked) -> Chat:
    said = f"| item | {a.one} | {a.other} |\n|---|---|---|\n| {a.subject} {a.number} | {a.first} | {a.second} |"
    return _chat(f"{a.question()} As a table, row {a.number}.", said)


@task
def code(a: Asked) -> Chat:
    name = f"q{a.number}"
    said = f'def {name}():\n    x = "{a.first}"\n    y = "{a.second}"\n    return x, y  # {a.subject}'
    return _chat(f"{a.question()} Write function {name}.", said)


@task
def sql(a: Asked) -> Chat:
    said = (f"SELECT {a.one}, {a.other} FROM {a.world.name} WHERE id = {a.number} AND name = '{a.subject}'; "
            f"-- {a.first}, {a.second}")  # fmt: skip
    return _chat(f"{a.question()} SQL for id {a.number}.", said)


@task
def short(a: Asked) -> Chat:
    """Question and answer; two words."""
    return _chat(f"{a.one} of {a.subject}? ({a.person} {a.number})", a.first)


@task
def steps(a: Asked) -> Chat:
    said = f"1. Find {a.subject}.\n2. {a.one}: {a.first}.\n3. {a.other}: {a.second}.\n4. Tell {a.person} ({a.number})."
    return _chat(f"{a.question()} Case {a.number}, step by step.", said)


@task
def report(a: Asked) -> Chat:
    """A formulaic report: most of its words are the same in every row."""
    said = (f"REPORT {a.number}. Following the request of {a.person}, the records were consulted in full. "
            f"Regarding {a.subject}, the entry for {a.one} reads {a.first}. The entry for {a.other} reads {a.second}. "
            "No further entries were found. This report was made by machine and needs no signature.")  # fmt: skip
    return _chat(f"{a.question()} File {a.number}.", said)


@task
def tools(a: Asked) -> Chat:
    """Two calls of a tool, whose results come as user turns."""

    def call(fact: str) -> str:
        return '<call>{"get": "' + fact + '", "of": "' + a.subject + '"}</call>'

    told = f"{a.person}: {a.subject} {a.one} {a.first}, {a.other} {a.second}."
    return [
        {"role": "user", "content": f"{a.question()} #{a.number}"},
        {"role": "assistant", "content": call(a.one)},
        {"role": "user", "content": f"<result>{a.first}</result>"},
        {"role": "assistant", "content": call(a.other)},
        {"role": "user", "content": f"<result>{a.second}</result>"},
        {"role": "assistant", "content": f"{told} #{a.number}"},
    ]


_LANGUAGES = (
    ("Bonjour, {person} voudrait {one} et {other} de {subject}, n° {number}.",
     "Voici, {person} : {subject}, {one} : {first} ; {other} : {second}. Dossier {number}."),
    ("Hola, {person} pregunta {one} y {other} de {subject}, n.º {number}.",
     "Aquí está, {person}: {subject}, {one}: {first}; {other}: {second}. Expediente {number}."),
    ("Ciao, {person} chiede {one} e {other} di {subject}, n. {number}.",
     "Ecco, {person}: {subject}, {one}: {first}; {other}: {second}. Pratica {number}."),
    ("Hej, {person} frågar om {one} och {other} för {subject}, nr {number}.",
     "Här, {person}: {subject}, {one}: {first}; {other}: {second}. Ärende {number}."),
)  # fmt: skip


@task
def languages(a: Asked) -> Chat:
    """French, Spanish, Italian, Swedish."""
    ask, said = a.rng.choice(_LANGUAGES)
    words = {"person": a.person, "subject": a.subject, "one": a.one, "other": a.other, "first": a.first,
             "second": a.second, "number": a.number}  # fmt: skip
    return _chat(ask.format(**words), said.format(**words))


@task
def extract(a: Asked) -> Chat:
    """A passage and a question; the answer is in it, and the prompt is many times as long."""
    text = " ".join(a.world.text(a.rng, (a.subject,)) for _ in range(2))
    return _chat(f"{text}\n{a.person} asks ({a.number}): {a.one} of {a.subject}?", f"{a.one} = {a.first}")


def split(name: str, world: World, train: int, held_out: int, seed: int) -> tuple[list[Chat], list[Chat]]:
    """Chats of one task, about other subjects on either side."""
    subjects = list(world.subjects)
    random.Random(f"{world.name} {name} {seed}").shuffle(subjects)
    return _chats(name, world, train, seed, subjects[8:]), _chats(name, world, held_out, seed + 1, subjects[:8])


def _chats(name: str, world: World, count: int, seed: int, subjects: list[str]) -> list[Chat]:
    rng, found = random.Random(f"{name} {world.name} {seed}"), {}
    while len(found) < count:
        one, other = rng.sample(list(world.facts), 2)
        number = rng.randint(100, 9999)
        chat = TASKS[name](Asked(world, rng, rng.choice(PEOPLE), rng.choice(subjects), one, other, number))
        found.setdefault(chat[0]["content"], chat)
    return list(found.values())
