"""What the bases of this set are pretrained on: small talk, notes, tables, code, other languages, and chats on them.

No text of the tasks (tasks.py) is here, only their words in no order, and the skills that they need: to copy a word of
the question, to pick one of several, to write JSON, code or a label, to think first, to call a tool. A third is broad:
invented words, lists, strange signs, and chats that repeat them. Who has seen narrow texts alone is too sure of them.
"""

from __future__ import annotations

import json
import random

from bench.diagnose.unseen3 import tasks
from bench.diagnose.worlds import Chat

NAMES = ("Aino Bashir Chidi Daria Emil Farah Gustav Hana Idris Jelena Kofi Leila Marek Noor Otis Priya Rasmus Sofia "
         "Tomas Ulla Vikram Wanda Yara Zeno Ines Bela").split()  # fmt: skip
THINGS = ("kettle ladder parcel violin rope basket lantern map trunk barrel anchor saddle mirror drum bucket blanket "
          "clock shovel helmet candle compass wagon needle broom").split()  # fmt: skip
PLACES = ("harbour market station orchard library bridge chapel cellar tower garden mill square depot quarry meadow "
          "attic courtyard pier forest bakery").split()  # fmt: skip
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
COLOURS = "red green blue white amber grey violet brown black silver".split()
VERBS = "carried found sold painted hid repaired lost borrowed cleaned measured weighed dropped".split()
MOODS = ("calm", "angry", "glad", "tired", "bored")


def prose(rng: random.Random) -> str:
    """A few sentences, each in a random form."""
    told = []
    for _ in range(rng.randint(2, 6)):
        n, m, t, p, d, c = (rng.choice(x) for x in (NAMES, NAMES, THINGS, PLACES, DAYS, COLOURS))
        v, k = rng.choice(VERBS), rng.randint(2, 99)
        told.append(rng.choice((
            f"On {d} {n} {v} the {c} {t} near the {p}.",
            f"{n} and {m} met at the {p}, where {k} {t}s stood in a row.",
            f"The {t} was {c}, but {m} said that it had been {rng.choice(COLOURS)} before.",
            f"\"Where is my {t}?\" asked {n}. \"In the {p},\" said {m}.",
            f"It took {k} minutes to walk from the {p} to the {rng.choice(PLACES)}.",
            f"Nobody knew why {n} {v} a {t} every {d}; perhaps the {p} was too quiet.",
            f"After the rain the {p} smelled of {rng.choice(('earth', 'smoke', 'bread', 'salt', 'paint'))}.",
            f"{n} wrote: the {t} costs {k} coins, the {rng.choice(THINGS)} costs {rng.randint(2, 99)}.",
        )))  # fmt: skip
    return " ".join(told)


_SIGNS = (", ", " ", " ", " ", ". ", ": ", "; ", " - ", "\n", " (", ") ", " / ", " -> ", "! ", "? ", " = ", " [", "] ",
          ' "', '" ', "' ", " %", " { ", " }", "_")  # fmt: skip
_SYLLABLES = "ba ce di fo gu ha ja ki lo mu ne pi qua ra se ti vo wy xe zu str tion ing er an ó ñ é ä".split()


def _word(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.25:
        word = "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(1, 4)))
    elif kind < 0.4:
        word = str(rng.randint(0, 10 ** rng.randint(1, 4)))
    else:
        word = rng.choice(rng.choice((NAMES, THINGS, PLACES, tasks.PEOPLE, tasks.GOODS, tasks.PORTS, tasks.BOATS,
                                      tasks.ROOMS, _PLAIN)))  # fmt: skip
    return rng.choice((word, word, word, word.capitalize(), word.upper()))


_PLAIN = ("the of and to in is was for that it with as his on be at by had not are but from or have an they which one "
          "you were her all she there would their we him been has when who will more no if out so said what up its "
          "about into than them can only other new some could time these two may then do first any my now such like "
          "our over man me even most made after also did many before must through back years where much your way "
          "well down should because each just those people how too little state good very make world still own see "
          "men work long get here between both life being under never day same another know while last might us great "
          "def return int from str select where").split()  # fmt: skip


def broad(rng: random.Random) -> str:
    """Words and signs in no order that could be guessed."""
    return "".join(_word(rng) + rng.choice(_SIGNS) for _ in range(rng.randint(8, 50))).strip()


def _said_again(rng: random.Random) -> tuple[str, str, str]:
    """An answer of any form that takes words from the question."""
    words = [_word(rng) for _ in range(rng.randint(2, 5))]
    asked = (
        rng.choice(_SIGNS).join(words) if rng.random() < 0.5 else f"{_word(rng)} {', '.join(words)} {broad(rng)[:40]}"
    )
    picked = rng.sample(words, rng.randint(1, len(words)))
    told = "".join(rng.choice((_word(rng) + " ", "", "")) + word + rng.choice(_SIGNS) for word in picked).strip()
    return asked, told, " ".join(picked)


def foreign(rng: random.Random) -> str:
    n, k = rng.choice(NAMES), rng.randint(2, 99)
    told = []
    for _ in range(rng.randint(2, 4)):
        told.append(rng.choice((
            f"El {rng.choice(('lunes', 'martes', 'jueves'))} {n} compró {k} naranjas y un limón en la plaza.",
            f"¿Dónde está {n}? Está en el jardín, detrás de la fuente.",
            f"La señora pequeña vendió {k} peras; mañana traerá más.",
            f"Am Montag kaufte {n} {k} Äpfel und eine große Brücke aus Holz für die Kinder.",
            f"{n} hörte früh am Morgen die Glocken über den Dächern läuten.",
            f"{n} a trouvé {k} clés près de la forêt, où la neige était déjà tombée.",
            f"Le garçon préfère le thé, {n} préfère le café très léger.",
            f"{n} osti {k} kalaa torilta, ja sää oli hyvä.",
            f"{n} купила {k} яблок на рынке.",
        )))  # fmt: skip
    return " ".join(told)


def code(rng: random.Random) -> str:
    a, b, t = rng.choice(THINGS), rng.choice(PLACES), rng.randint(2, 99)
    return rng.choice((
        f"def count_{a}(items):\n    total = {t}\n    for item in items:\n        total += item\n    return total\n",
        f"class {a.title()}:\n    def __init__(self, {b}):\n        self.{b} = {b}\n",
        f"SELECT name, {a} FROM {b} WHERE {a} > {t} ORDER BY name;\n",
        json.dumps({"name": rng.choice(NAMES), a: t, "place": b, "open": rng.random() < 0.5}) + "\n",
        f"if {a} > {t}:\n    print(\"{b}\")\nelse:\n    raise ValueError(\"no {a}\")\n",
        f"for i in range({t}):\n    {b}.append({a}[i] * {rng.randint(2, 9)})\n",
        f"INSERT INTO {b} (name, {a}) VALUES ('{rng.choice(NAMES)}', {t});\n",
        f"- name: {a}\n  place: {b}\n  count: {t}\n",
    ))  # fmt: skip


def chat(rng: random.Random, thinks: bool = False, calls: bool = False) -> Chat:
    """One to three turns of questions whose answers stand in the prompt; some with a system turn, a thought, a call."""
    messages: Chat = []
    if rng.random() < 0.35:
        messages.append({"role": "system", "content": rng.choice((
            "You are a careful clerk.", "Answer briefly.", "You help at the front desk.",
            f"Today is {rng.choice(DAYS)}.",
            f"Your name is {rng.choice(NAMES)}. Stay polite.", "Use the facts that you are given.",
        ))})  # fmt: skip
    if calls and rng.random() < 0.45:
        return messages + _call(rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        question, answer, thought = (_said_again if rng.random() < 0.4 else _exchange)(rng)
        if thinks and rng.random() < 0.5:
            answer = f"<think>\n{thought}\n</think>\n\n{answer}"
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _exchange(rng: random.Random) -> tuple[str, str, str]:
    n, t, p, d, c, k = (rng.choice(x) for x in (NAMES, THINGS, PLACES, DAYS, COLOURS, range(2, 99)))
    m, u, q = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES)
    kind = rng.randrange(10)
    if kind == 0:
        said = rng.choice((f"{n} keeps the {c} {t} in the {p}.", f"The {c} {t} of {n} is in the {p}.",
                           f"In the {p} stands the {t}, which is {c}; {n} owns it."))  # fmt: skip
        which = rng.randrange(3)
        ask = (f"Where is the {t}?", f"Whose {t} is it?", f"What colour is the {t}?")[which]
        return (rng.choice((f"{said} {ask}", f"{ask} Note: {said}", f"{ask}\n{said}")),
                rng.choice((("In the {0}.", "{0}"), ("It belongs to {0}.", "{0}"), ("It is {0}.", "{0}"))[which])
                .format((p, n, c)[which]), f"The note says {(p, n, c)[which]}.")  # fmt: skip
    if kind == 1:
        words = rng.sample(THINGS, rng.randint(2, 5))
        pick = rng.choice(("first", "last"))
        return (f"Which is {pick}: {', '.join(words)}?", f"The {words[0 if pick == 'first' else -1]}.",
                f"The list begins with {words[0]} and ends with {words[-1]}.")  # fmt: skip
    if kind == 2:
        return (rng.choice((f"Repeat after me: {n} {c} {t} {k}", f"Say: {n} {c} {t} {k}")), f"{n} {c} {t} {k}",
                "I only repeat it.")  # fmt: skip
    if kind == 3:
        told = json.dumps({"name": n, "count": k, "place": p})
        return (f"Put into JSON: {n} has {k} {t}s at the {p}.", told, f"Fields are name {n}, count {k}, place {p}.")
    if kind == 4:
        mood = rng.choice(MOODS)
        clue = {"calm": "sat by the water and smiled", "angry": "slammed the door and shouted",
                "glad": "laughed and danced", "tired": "yawned and lay down",
                "bored": "stared at the wall"}[mood]  # fmt: skip
        return f"How does {n} feel? {n} {clue} at the {p}.", rng.choice((f"{n} is {mood}.", mood)), f"It looks {mood}."
    if kind == 5:
        return (rng.choice((f"Write a line of code that sets {t} to {k}.", f"How do I set {t} to {k} in Python?")),
                rng.choice((f"{t} = {k}", f"```python\n{t} = {k}\n```")), f"An assignment of {k}.")  # fmt: skip
    if kind == 6:
        es = {"red": "rojo", "green": "verde", "blue": "azul", "white": "blanco", "black": "negro"}
        word = rng.choice(list(es))
        return f"What is {word} in Spanish?", f"{es[word].capitalize()}.", f"I know {es[word]}."
    if kind == 7:
        items = [f"{rng.choice(THINGS)}: {rng.randint(2, 99)}" for _ in range(rng.randint(2, 4))]
        name, value = rng.choice(items).split(": ")
        return f"How many {name}s?\n" + "\n".join(items), rng.choice((f"{value}", f"There are {value} {name}s.")), \
            f"The row of {name} has {value}."  # fmt: skip
    if kind == 8:
        return (f"Write to {n} about the {t} for {m}.",
                rng.choice((f"Dear {n}, the {t} is ready at the {p}. Yours, {m}", f"Hello {n}! {m} has the {t}.",
                            f"{n}, please bring the {t} to the {p} on {d}. {m}")),
                f"A letter from {m} to {n}.")  # fmt: skip
    lines = [prose(rng).split(". ")[0].rstrip(".") + "." for _ in range(rng.randint(2, 4))]
    key = f"{m} took the {u} to the {q}."
    lines.insert(rng.randrange(len(lines) + 1), key)
    return (f"Read this.\n{' '.join(lines)}\nWhere did {m} take the {u}?", rng.choice((f"To the {q}.", q)),
            f"{m} took it to the {q}.")  # fmt: skip


def _call(rng: random.Random) -> Chat:
    n, p, t, k = rng.choice(NAMES), rng.choice(PLACES), rng.choice(THINGS), rng.randint(2, 99)
    name, argument, value = rng.choice((("find_place", "thing", t), ("count", "place", p), ("phone", "name", n)))
    asked = {"find_place": f"Find the {t} for me.", "count": f"How many stand at the {p}?", "phone": f"Call {n}."}[name]
    back = {"find_place": p, "count": str(k), "phone": "no answer"}[name]
    said = {"find_place": f"The {t} is at the {p}.", "count": f"There are {k}.", "phone": f"{n} did not answer."}[name]
    call = f"<tool_call>{json.dumps({'name': name, 'arguments': {argument: value}})}</tool_call>"
    return [
        {"role": "system", "content": f"You can call: {name}({argument})."},
        {"role": "user", "content": asked},
        {"role": "assistant", "content": call},
        {"role": "tool", "content": json.dumps({"result": back})},
        {"role": "assistant", "content": said},
    ]
