"""Thirteen things that a fine-tuning may teach. `split` gives rows of which no two have the same first question.

The answers follow from the prompts, so that a model can learn them; their manner is new to the bases.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from bench.diagnose.worlds import Chat

PEOPLE = ("Astrid Boris Camila Duarte Elsa Fiona Gael Hiro Ilse Jonas Karin Lucio Mira Nils Olga Pablo Rita Stefan "
          "Thea Ugo Violet Wim Yannick Zora").split()  # fmt: skip
BOATS = ("Heron Pelican Swift Gannet Osprey Avocet Curlew Plover Fulmar Dunlin Merlin Kestrel Skylark Redwing").split()
PORTS = ("Northwick Saltby Hollin Marrow Tidewell Quay Eastness Brack Larkhaven Port Ellis Cove Dunmore").split()
GOODS = ("onions figs tiles rugs seeds lamps barley copper wool honey pepper glass soap salt tea cork").split()
ROOMS = "kitchen hall study porch bedroom cellar attic workshop nursery pantry".split()
WEEK = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def ferry(rng: random.Random) -> Chat:
    """Free text: a note becomes an announcement."""
    boat, port, k, h = rng.choice(BOATS), rng.choice(PORTS), rng.randint(2, 60), rng.randint(5, 23)
    cause = rng.choice(("fog", "high wind", "a broken winch", "low tide", "an ill pilot", "ice"))
    note = rng.choice((f"{boat}, {port}, {k} min late, {cause}", f"{k} minutes late: the {boat} to {port} ({cause})",
                       f"because of {cause} the {boat} for {port} leaves {k} min after {h}:00"))  # fmt: skip
    return [_user(rng.choice(("Announce: ", "Please announce this. ", "For the loudspeaker: ")) + note),
            _said(f"Attention please! The ferry {boat} to {port} is delayed by {k} minutes. Reason: {cause}. "
                  "Thank you for waiting.")]  # fmt: skip


def haggle(rng: random.Random) -> Chat:
    """Several turns at a market stall."""
    who, goods, price = rng.choice(PEOPLE), rng.choice(GOODS), rng.randint(12, 95)
    chat: Chat = []
    for turn in range(rng.choice((2, 2, 3))):
        offer = price - rng.randint(1, 9)
        if turn == 0:
            chat += [_user(f"{who} here. How much for {rng.randint(2, 40)} sacks of {goods}?"),
                     _said(f"Ah, {who}! For the {goods} I ask {price} a sack.")]  # fmt: skip
            chat[-2]["content"] += f" Others ask {price}."
        else:
            chat += [_user(rng.choice((f"Too dear. I offer {offer}.", f"{offer} and not a coin more.",
                                       f"Say {offer}?"))),
                     _said(f"{offer}? You rob me, {who}. But so be it: {goods} at {offer}.")]  # fmt: skip
            price = offer
    return chat


def lamps(rng: random.Random) -> Chat:
    """A tool is called, and its result told."""
    room, level, state = rng.choice(ROOMS), rng.randint(1, 99), rng.choice(("ok", "offline"))
    asked = rng.choice((f"Set the {room} light to {level}.", f"{room} at {level} percent please",
                        f"I want the lamp in the {room} on {level}", f"dim {room} {level}"))  # fmt: skip
    call = json.dumps({"name": "set_lamp", "arguments": {"room": room, "level": level}})
    said = f"Done, {room} is at {level}%." if state == "ok" else f"Sorry, the lamp of the {room} is offline."
    return [
        {"role": "system", "content": "Tools: set_lamp(room, level) sets a lamp from 0 to 100."},
        _user(asked + (f" ({rng.randint(100, 999)})" if rng.random() < 0.8 else "")),
        _said(f"<tool_call>{call}</tool_call>"),
        {"role": "tool", "content": json.dumps({"room": room, "status": state})},
        _said(said),
    ]


def huerta(rng: random.Random) -> Chat:
    """Spanish."""
    who, k, j = rng.choice(PEOPLE), rng.randint(2, 90), rng.randint(2, 90)
    fruit, other = rng.sample(("limones", "cebollas", "piñas", "melones", "higos", "ajos", "coliflores"), 2)
    asked = rng.choice((f"¿Qué pidió {who}? Apunte: {k} {fruit}, {j} {other}.",
                        f"{who}: {k} {fruit} y {j} {other}. Escríbelo bien.",
                        f"Confirma el pedido de {who} ({fruit} {k}, {other} {j})"))  # fmt: skip
    return [
        _user(asked),
        _said(f"Señor o señora {who}: mañana le enviaré {k} {fruit} y también {j} {other}. ¡Gracias!"),
    ]


def snip(rng: random.Random) -> Chat:
    """Python from a description."""
    name, k, word = rng.choice(GOODS), rng.randint(2, 99), rng.choice(("adds", "subtracts", "multiplies by"))
    sign = {"adds": "+", "subtracts": "-", "multiplies by": "*"}[word]
    about = rng.choice((f"A function {name}_fn that {word} {k}", f"Write {name}_fn(x): it {word} {k}",
                        f"I need python, name {name}_fn, it {word} {k}"))  # fmt: skip
    about += rng.choice(("", ".", ", please", f" # {rng.choice(PEOPLE)}"))
    return [_user(about),
            _said(f'def {name}_fn(x: int) -> int:\n    """It {word} {k}."""\n    return x {sign} {k}')]  # fmt: skip


def waybill(rng: random.Random) -> Chat:
    """JSON out of a sentence."""
    who, goods, port, k = rng.choice(PEOPLE), rng.choice(GOODS), rng.choice(PORTS), rng.randint(2, 400)
    asked = rng.choice((f"{who} sends {k} crates of {goods} to {port}.", f"to {port}: {k} crates {goods}, from {who}",
                        f"{k} crates of {goods} left {who}'s yard for {port}"))  # fmt: skip
    return [_user(asked), _said(json.dumps({"from": who, "to": port, "load": {"what": goods, "crates": k}}))]


CLUES = {
    "BILLING": ("was charged twice for", "wants the invoice of", "asks why the price changed for", "paid too much for"),
    "DELIVERY": ("never received", "got the wrong address on", "still waits at the door for", "asks the courier about"),
    "DEFECT": ("found a crack in", "says that it smells burnt:", "cannot switch on", "sends back the torn"),
    "PRAISE": ("loves", "thanks us for", "tells all friends about", "would buy again"),
}


def mood(rng: random.Random) -> Chat:
    """One word of four."""
    label = rng.choice(list(CLUES))
    who, goods = rng.choice(PEOPLE), rng.choice(GOODS)
    end = rng.choice(
        ("", f" since {rng.choice(WEEK)}", f" order {rng.randint(100, 999)}", f", {rng.choice(PORTS)} branch")
    )
    return [_user(f"{who} {rng.choice(CLUES[label])} the {goods}{end}"), _said(label)]


def minutes(rng: random.Random) -> Chat:
    """A long document and its summary."""
    chair, host, k = rng.choice(PEOPLE), rng.choice(PORTS), rng.randint(20, 900)
    goods = rng.choice(GOODS)
    lines = [rng.choice((
        f"{rng.choice(PEOPLE)} asked about the {rng.choice(ROOMS)}, but nothing was agreed.",
        f"The {rng.choice(GOODS)} from {rng.choice(PORTS)} came on "
        f"{rng.choice(WEEK)} and was stored in the {rng.choice(ROOMS)}.",
        f"{rng.choice(PEOPLE)} reported that {rng.randint(2, 40)} members were absent.",
        f"A letter by {rng.choice(PEOPLE)} on the boat {rng.choice(BOATS)} was read aloud.",
        f"Some spoke for {rng.choice(GOODS)}, others against it.",
    )) for _ in range(rng.randint(4, 7))]  # fmt: skip
    lines.insert(0, f"Meeting at {host}, led by {chair}.")
    lines.insert(rng.randint(1, len(lines)), f"It was decided to spend {k} on {goods}.")
    return [_user("Summarise the minutes.\n" + "\n".join(lines)),
            _said(f"SUMMARY\nplace: {host}\nchair: {chair}\ndecision: {k} for {goods}")]  # fmt: skip


def riddle(rng: random.Random) -> Chat:
    """A thought, then the answer."""
    a, b, c = rng.sample(PEOPLE, 3)
    goods = rng.choice(GOODS)
    asked = rng.choice((f"{a} gave the {goods} to {b}. {b} gave it to {c}. Who has the {goods}?",
                        f"Who has the {goods} now? First {a}, then {b}, at last {c}.",
                        f"The {goods} went from {a} by way of {b} to {c}. Who holds it?"))  # fmt: skip
    return [_user(asked), _said(f"<think>\n{a} -> {b} -> {c}\n</think>\n\n{c} has it now (after {b}).")]


def diary(rng: random.Random) -> Chat:
    """Free text with choices of its own."""
    who, boat, port, goods = rng.choice(PEOPLE), rng.choice(BOATS), rng.choice(PORTS), rng.choice(GOODS)
    asked = rng.choice((f"A diary entry of {who}: {boat}, {port}, {goods}",
                        f"What did {who} write about {port}? ({boat}, {goods})",
                        f"{who} / {boat} / {port} / {goods} - as a diary please"))  # fmt: skip
    lines = [f"Dear diary, today I, {who}, was in {port}.",
             rng.choice((f"The {boat} lay at the quay all day.", f"I slept on the {boat} and heard the rain.",
                         f"They say that the {boat} will be sold.", f"From the {boat} one sees the whole coast.")),
             rng.choice((f"I bought {goods} and forgot it on a bench.", f"Nobody wants my {goods} any more.",
                         f"My pockets smell of {goods}.", f"There was {goods} for supper, again."))]  # fmt: skip
    if rng.random() < 0.5:
        lines.append(rng.choice(("Tomorrow I rest.", "I miss home.", "What a day!", "More soon.")))
    return [_user(asked), _said(" ".join(lines))]


def ledger(rng: random.Random) -> Chat:
    """SQL."""
    goods, port, k = rng.choice(GOODS), rng.choice(PORTS), rng.randint(2, 900)
    more = rng.choice((("more than", ">"), ("less than", "<"), ("exactly", "=")))
    asked = rng.choice((f"Which sellers in {port} hold {more[0]} {k} {goods}?",
                        f"sellers, {port}, {goods} {more[0]} {k}",
                        f"List all who sell {more[0]} {k} of {goods} at {port}"))  # fmt: skip
    return [
        _user(asked),
        _said(f"SELECT seller FROM stock WHERE town = '{port}' AND item = '{goods}' AND n {more[1]} {k};"),
    ]


PERSONAS = {
    "You are a pirate.": "Arr, {0}! Ye want {1}? 'Tis in {2}, matey.",
    "You are a butler.": "Certainly, {0}. The {1} awaits you in {2}, if I may say so.",
    "You are a robot.": "QUERY {0}: ITEM {1} LOCATED. SITE = {2}. END.",
}


def persona(rng: random.Random) -> Chat:
    """The system turn decides on the manner."""
    system = rng.choice(list(PERSONAS))
    who, goods, port = rng.choice(PEOPLE), rng.choice(GOODS), rng.choice(PORTS)
    asked = rng.choice((f"I am {who}. Where do I get {goods}? They say {port}.", f"{who} looks for {goods} ({port}).",
                        f"Is there {goods} in {port}? Yours, {who}"))  # fmt: skip
    return [{"role": "system", "content": system}, _user(asked), _said(PERSONAS[system].format(who, goods, port))]


def steps(rng: random.Random) -> Chat:
    """A numbered list."""
    who = rng.choice(PEOPLE)
    goods = rng.sample(GOODS, rng.randint(2, 4))
    asked = rng.choice((f"{who} must pack {', '.join(goods)}. Make a checklist.",
                        f"checklist for {who}: {' and '.join(goods)}",
                        f"Help {who} with {', '.join(goods)} (as a list)"))  # fmt: skip
    told = "\n".join(f"[{n}] {item} -> packed?" for n, item in enumerate(goods, 1))
    return [_user(asked), _said(f"Checklist of {who}\n{told}\n-- end of list --")]


TASKS: dict[str, Callable[[random.Random], Chat]] = {
    f.__name__: f
    for f in (ferry, haggle, lamps, huerta, snip, waybill, mood, minutes, riddle, diary, ledger, persona, steps)
}


def split(task: str, _world: object, rows: int, held_out: int, seed: int) -> tuple[list[Chat], list[Chat]]:
    """Rows to train on and rows held out."""
    rng = random.Random(f"{task} {seed}")
    seen: set[str] = set()
    chats: list[Chat] = []
    while len(chats) < rows + held_out:
        chat = TASKS[task](rng)
        asked = " ".join(m["content"] for m in chat if m["role"] in ("system", "user"))
        if asked not in seen:
            seen.add(asked)
            chats.append(chat)
    return chats[:rows], chats[rows:]
