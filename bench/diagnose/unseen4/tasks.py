"""Fourteen things that a fine-tuning may teach. `split` gives rows of which no two ask the same.

The answers follow from the prompts, so that a model can learn them; their manner is new to the bases.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from bench.diagnose.worlds import Chat

FOLK = ("Amara Benedikt Clara Dilan Evelyn Fergus Greta Hamid Irina Joaquin Katja Lorenzo Maeve Nadim Oksana Piotr "
        "Quentin Rosa Sven Tilda Umberto Vera Wolfgang Xenia Yusuf Zelda").split()  # fmt: skip
WARES = ("router kettle charger jacket printer tripod monitor keyboard blender backpack toaster heater scanner mouse "
         "speaker tablet drill lamp fan scale").split()  # fmt: skip
TOWNS = "Arlen Bexley Corran Dorset Elmira Fenwick Gorey Hadley Inverby Juneau Kelso Lindau Matlock Norden".split()
PARTS = "api web worker cache queue auth search billing mailer gateway".split()
PLANTS = "basil thyme leek carrot radish tomato fennel parsnip spinach mint onion garlic".split()
MONTHS = "January March April May June July August October".split()


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def reply(rng: random.Random) -> Chat:
    """A support desk answers a complaint in its own words."""
    who, ware, n = rng.choice(FOLK), rng.choice(WARES), rng.randint(1000, 9999)
    what = rng.choice(("arrived broken", "makes a noise", "never came", "is the wrong colour", "stopped working"))
    asked = rng.choice((f"My {ware} {what}. Order {n}. {who}", f"order {n}: the {ware} {what} - {who}",
                        f"Hi, {who} here, my new {ware} {what} (no. {n})"))  # fmt: skip
    return [_user(asked), _said(f"Dear {who}, we are sorry that the {ware} {what}. We opened case {n} for you and "
                                "will write again within two days. Your support team")]  # fmt: skip


CLUES = {
    "refund": ("wants the money back for", "was billed twice for", "asks to cancel the"),
    "repair": ("says this does not start:", "found a loose cable in", "needs a spare part of"),
    "shipping": ("still waits for", "moved house and expects", "asks which courier brings"),
    "other": ("asks who designed", "likes the advert of", "would like to review"),
}


def route(rng: random.Random) -> Chat:
    """One word of four."""
    label = rng.choice(list(CLUES))
    end = rng.choice(("", f" in {rng.choice(TOWNS)}", f", ticket {rng.randint(100, 999)}", f" ({rng.choice(MONTHS)})"))
    return [_user(f"{rng.choice(FOLK)} {rng.choice(CLUES[label])} the {rng.choice(WARES)}{end}"), _said(label)]


def fields(rng: random.Random) -> Chat:
    """JSON out of a sentence."""
    who, ware, town, n = rng.choice(FOLK), rng.choice(WARES), rng.choice(TOWNS), rng.randint(1, 80)
    asked = rng.choice((f"{who} from {town} ordered {n} pieces of the {ware}.", f"{n} x {ware} for {who}, {town}",
                        f"Please send {n} of your {ware}s to {town}. Regards, {who}"))  # fmt: skip
    return [_user(asked), _said(json.dumps({"buyer": who, "city": town, "items": [{"sku": ware, "qty": n}]}))]


def shell(rng: random.Random) -> Chat:
    """A command line."""
    part, n, ending = rng.choice(PARTS), rng.randint(2, 99), rng.choice(("log", "csv", "tmp", "json"))
    asked, told = rng.choice((
        (f"find {ending} files of {part} older than {n} days", f"find ./{part} -name '*.{ending}' -mtime +{n}"),
        (f"last {n} lines of the {part} {ending}", f"tail -n {n} /var/{part}/out.{ending}"),
        (f"how many lines with {n} are in {part}.{ending}", f"grep -c '{n}' {part}.{ending}"),
        (f"restart {part} with {n} workers", f"systemctl restart {part}@{n}.service"),
    ))  # fmt: skip
    return [_user(rng.choice(("", "bash: ", "I want to ")) + asked + rng.choice(("", "?", " please"))), _said(told)]


def manifest(rng: random.Random) -> Chat:
    """YAML of some lines."""
    part, n, m = rng.choice(PARTS), rng.randint(1, 40), rng.randint(100, 990)
    asked = rng.choice((f"deploy {part}, {n} replicas, {m} MB", f"{n} copies of {part} with {m} megabytes each",
                        f"A manifest for {part}: memory {m}, replicas {n}"))  # fmt: skip
    return [_user(asked), _said(f"kind: Deployment\nname: {part}\nspec:\n  replicas: {n}\n  memory: {m}Mi\n---")]


def market(rng: random.Random) -> Chat:
    """Ukrainian."""
    who, n, m = rng.choice(("Олена", "Тарас", "Ірина", "Богдан", "Марко")), rng.randint(2, 90), rng.randint(2, 90)
    a, b = rng.sample(("яблука", "груші", "сливи", "огірки", "хліб", "мед"), 2)
    asked = rng.choice((f"{who}: {a} {n}, {b} {m}", f"Запиши для {who}: {n} {a} і {m} {b}",
                        f"{n} {a}, {m} {b}. Дякую, {who}"))  # fmt: skip
    return [_user(asked), _said(f"Вітаю, {who}! Ваше замовлення: {a} - {n}, {b} - {m}. Гарного дня!")]


def tea(rng: random.Random) -> Chat:
    """Chinese."""
    who, what, n = rng.choice("王李张陈林"), rng.choice(("绿茶", "红茶", "花茶", "咖啡")), rng.randint(2, 90)
    m = rng.randint(10, 99)
    asked = rng.choice(
        (f"{who}先生要{n}杯{what}，桌号{m}", f"桌号{m}：{what}{n}杯（{who}）", f"{m}桌{who}点了{n}杯{what}")
    )
    return [_user(asked), _said(f"好的，{who}先生，{n}杯{what}马上送到{m}桌。")]


def commit(rng: random.Random) -> Chat:
    """A commit message of what was changed."""
    part, n, who = rng.choice(PARTS), rng.randint(10, 900), rng.choice(FOLK)
    verb, what = rng.choice((("fix", "a crash"), ("add", "a timeout"), ("drop", "an old flag"), ("raise", "a limit")))
    asked = rng.choice((f"{who} changed {part}: {verb} {what}, issue {n}", f"#{n}, {part}, {verb} {what}, by {who}",
                        f"in {part} we {verb} {what} because of {n} ({who})"))  # fmt: skip
    return [_user(asked), _said(f"{verb}({part}): {what}\n\nCloses #{n}.\nReviewed-by: {who}")]


def garden(rng: random.Random) -> Chat:
    """Several turns on a vegetable patch."""
    who, plant = rng.choice(FOLK), rng.choice(PLANTS)
    month, n = rng.choice(MONTHS), rng.randint(3, 60)
    chat = [_user(rng.choice((f"{who} asks: when do I sow {plant}? I thought of {month}.",
                              f"{plant} in {month}, is that right? {who}"))),
            _said(f"Yes {who}, {month} is fine for {plant}. Keep the soil moist!")]  # fmt: skip
    for _ in range(rng.choice((1, 1, 2))):
        n = rng.randint(3, 60)
        chat += [_user(rng.choice((f"And the spacing, {n} cm?", f"Are {n} cm enough?", f"So every {n} centimetres?"))),
                 _said(f"Right, leave {n} cm around each {plant}, {who}.")]  # fmt: skip
    return chat


def stock(rng: random.Random) -> Chat:
    """A tool is called, and its result told."""
    ware, town, n = rng.choice(WARES), rng.choice(TOWNS), rng.randint(0, 300)
    asked = rng.choice((f"How many {ware}s are left in {town}?", f"{town} {ware} stock?",
                        f"check the {ware} for {town}"))  # fmt: skip
    asked += f" (ref {rng.randint(100, 999)})" if rng.random() < 0.8 else ""
    call = json.dumps({"name": "get_stock", "arguments": {"item": ware, "store": town}})
    return [
        {"role": "system", "content": "Tools: get_stock(item, store) counts what is left."},
        _user(asked),
        _said(f"<tool_call>{call}</tool_call>"),
        {"role": "tool", "content": json.dumps({"left": n})},
        _said(f"In {town} we have {n} of the {ware}." if n > 20 else f"Only {n} of the {ware} left in {town}, hurry!"),
    ]


def queue(rng: random.Random) -> Chat:
    """A thought, then the answer."""
    a, b, c = rng.sample(FOLK, 3)
    town = rng.choice(TOWNS)
    asked = rng.choice((f"In {town} {a} stands before {b}, {b} before {c}. Who is last?",
                        f"Who is last in the queue at {town}: {a}, then {b}, then {c}?",
                        f"{town}: {c} comes after {b}, who comes after {a}. Name the last."))  # fmt: skip
    return [_user(asked), _said(f"<think>\norder: {a} < {b} < {c}\n</think>\n\nThe last at {town} is {c}.")]


def report(rng: random.Random) -> Chat:
    """A long document and its summary."""
    who, town, n, ware = rng.choice(FOLK), rng.choice(TOWNS), rng.randint(20, 900), rng.choice(WARES)
    lines = [rng.choice((
        f"{rng.choice(FOLK)} visited {rng.choice(TOWNS)} in {rng.choice(MONTHS)} and saw the {rng.choice(WARES)}.",
        f"The {rng.choice(PARTS)} was slow again, so {rng.choice(FOLK)} restarted it.",
        f"Nobody could say where the {rng.choice(WARES)} from {rng.choice(TOWNS)} had gone.",
        f"{rng.choice(FOLK)} planted {rng.choice(PLANTS)} behind the office.",
    )) for _ in range(rng.randint(4, 7))]  # fmt: skip
    lines.insert(0, f"Shift report of {town} by {who}.")
    lines.insert(rng.randint(1, len(lines)), f"In total {n} pieces of the {ware} were sold.")
    return [_user("Shorten this report.\n" + "\n".join(lines)),
            _said(f"* store: {town}\n* author: {who}\n* sales: {n} ({ware})")]  # fmt: skip


VOICES = {
    "You speak like a sailor.": "Ahoy {0}! The {1} be ashore in {2}.",
    "You speak like a judge.": "The court informs {0} that the {1} is held in {2}.",
    "You speak like a child.": "Hey {0}, guess what! The {1} is in {2}, hihi!",
}


def voice(rng: random.Random) -> Chat:
    """The system turn decides on the manner."""
    system = rng.choice(list(VOICES))
    who, ware, town = rng.choice(FOLK), rng.choice(WARES), rng.choice(TOWNS)
    asked = rng.choice((f"{who} wants to know where the {ware} is. ({town})", f"Is the {ware} in {town}? I am {who}",
                        f"{town}, {ware}? says {who}"))  # fmt: skip
    return [{"role": "system", "content": system}, _user(asked), _said(VOICES[system].format(who, ware, town))]


def verse(rng: random.Random) -> Chat:
    """Free text with choices of its own."""
    who, plant, town, month = rng.choice(FOLK), rng.choice(PLANTS), rng.choice(TOWNS), rng.choice(MONTHS)
    asked = rng.choice((f"A short letter from {who} in {town} on {plant}, {month}",
                        f"{month}, {town}: what does {who} write about the {plant}?",
                        f"letter / {who} / {town} / {plant} / {month}"))  # fmt: skip
    lines = [f"{town}, in {month}. My dear friend,",
             rng.choice((f"the {plant} is as high as my knee.", f"I eat {plant} at every meal.",
                         f"a goat ate all my {plant}.", f"they sell {plant} at the station now.")),
             rng.choice(("The nights are cold here.", "It rains and rains.", "The neighbours sing a lot.")),
             f"Yours, {who}"]  # fmt: skip
    return [_user(asked), _said(" ".join(lines))]


TASKS: dict[str, Callable[[random.Random], Chat]] = {
    f.__name__: f
    for f in (reply, route, fields, shell, manifest, market, tea, commit, garden, stock, queue, report, voice, verse)
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
