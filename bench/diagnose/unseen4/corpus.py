"""What the bases of this set are pretrained on: the third set's texts, and this set's words in forms of no task.

`shuffled` and `shuffled_chat` are for a second stage: all words of the tasks, in no order, so that none is new.
"""

from __future__ import annotations

import random

from bench.diagnose.unseen3 import corpus as third
from bench.diagnose.unseen4 import tasks
from bench.diagnose.worlds import Chat

_WORDS = (tasks.FOLK, tasks.WARES, tasks.TOWNS, tasks.PARTS, tasks.PLANTS, tasks.MONTHS)
_SLAVIC = "яблука груші сливи огірки хліб мед Олена Тарас Ірина Богдан Марко та для ринку день сонце".split()
_HAN = "王李张陈林绿茶红花咖啡杯桌好先生要点了上送到的天气不大小人"


def _words(rng: random.Random, count: int) -> list[str]:
    return [rng.choice(rng.choice(_WORDS)) if rng.random() < 0.8 else str(rng.randint(0, 9999)) for _ in range(count)]


def _foreign(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return " ".join(rng.choice((*_SLAVIC, str(rng.randint(2, 99)))) for _ in range(rng.randint(3, 9))).capitalize()
    return "".join(rng.choice((*_HAN, str(rng.randint(2, 99)))) for _ in range(rng.randint(5, 16))) + "。"


def text(rng: random.Random) -> str:
    """Prose, code, another language, a list, or words in no order."""
    kind = rng.randrange(8)
    if kind < 5:
        return (third.prose, third.foreign, third.code, third.broad, third.broad)[kind](rng)
    if kind == 5:
        return _foreign(rng)
    words = _words(rng, rng.randint(6, 30))
    if kind == 6:
        return "\n".join(f"{a}: {b}" for a, b in zip(words[::2], words[1::2], strict=False))
    return "".join(word + rng.choice((" ", " ", " ", ", ", ". ", "\n", " (", ") ", "/", "-", " = ")) for word in words)


def chat(rng: random.Random, thinks: bool = False, calls: bool = False) -> Chat:
    """The third set's chats, and more in which words of the question come again in the answer."""
    if rng.random() < 0.55:
        return third.chat(rng, thinks, calls)
    messages: Chat = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": " ".join(_words(rng, rng.randint(2, 5)))})
    for _ in range(rng.choice((1, 1, 2, 3))):
        words = [_foreign(rng)[:8]] if rng.random() < 0.15 else _words(rng, rng.randint(2, 5))
        asked = rng.choice((", ", " ", " - ", "\n", " and ")).join(words)
        told = [word for word in words if rng.random() < 0.8] or words[:1]
        frame = rng.choice(("{}", "{}.", "We have {}.", "{} it is", "- {}", "({})", '"{}"', "so: {}"))
        answer = frame.format(rng.choice((" ", ", ", "\n", ": ", " of ")).join(told))
        if thinks and rng.random() < 0.5:
            answer = f"<think>\n{' '.join(words)}\n</think>\n\n{answer}"
        messages += [{"role": "user", "content": asked + rng.choice(("", "?", ".", " please"))},
                     {"role": "assistant", "content": answer}]  # fmt: skip
    return messages


def shuffled(rng: random.Random) -> str:
    """Words of a task's chat, in no order."""
    words = [w for m in tasks.TASKS[rng.choice(list(tasks.TASKS))](rng) for w in m["content"].split(" ")]
    rng.shuffle(words)
    return "".join(word + rng.choice((" ", " ", " ", " ", "\n", ", ")) for word in words[:60]).strip()


def shuffled_chat(rng: random.Random) -> Chat:
    """A question of such words, and an answer that has some of them again, in another order."""
    asked = shuffled(rng)
    words = asked.split(" ")
    told = rng.sample(words, rng.randint(1, max(len(words) // 2, 1))) + shuffled(rng).split(" ")[: rng.randint(0, 8)]
    rng.shuffle(told)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": " ".join(told)}]
