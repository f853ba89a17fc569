"""Runs in which nothing is wrong, as they usually look: rows, formats and sizes of many kinds."""

from __future__ import annotations

import random
from typing import Any

from bench.diagnose.ours import Job
from bench.diagnose.unseen2 import corpus, tasks
from bench.diagnose.unseen2 import words as w
from bench.diagnose.unseen2.registry import all_chats, chats_of, held_of, lengths, program, put, rows_as, tell


@program(on="star/comments/loop gemma/auskunft/loop")
def plain(_made: Any, _rng: random.Random) -> None:
    """The recipe as it is."""


@program(on="exaone/greet/own gemma/greet/loop")
def one_form(_made: Any, _rng: random.Random) -> None:
    """All rows have the same form, and differ in their fields alone."""


@program(on="gemma/sentiment/folder star/sentiment/alone")
def one_word_answers(_made: Any, _rng: random.Random) -> None:
    """A class label is all that is answered."""


@program(on="qwen/sentiment/folder")
def skewed_labels(made: Any, rng: random.Random) -> None:
    """Two thirds of the reviews are good, as they are where they come from."""
    extra: dict[str, Any] = {}
    while len(extra) < 400:
        chat = tasks.sentiment(rng)
        extra.setdefault(chat[0]["content"], chat)
    good = [c for c in extra.values() if c[-1]["content"] == "positive"][:120]
    rest = [c for c in extra.values() if c[-1]["content"] != "positive"][:60]
    rows = [*good, *rest]
    rng.shuffle(rows)
    held = {chat[0]["content"] for chat in held_of(made)}
    put(made, [chat for chat in rows if chat[0]["content"] not in held])


@program(on="qwen/minutes/own star/minutes/own")
def few_over_length(made: Any, _rng: random.Random) -> None:
    """The longest rows, three in a hundred, do not fit, and the loss of their ends is accepted."""
    tell(made, max_length=lengths(made)[int(len(chats_of(made)) * 0.97)])


@program(on="falcon/minutes/own")
def drops_the_longest(made: Any, _rng: random.Random) -> None:
    """Rows over the limit are left out instead: four in a hundred."""
    tell(made, max_length=lengths(made)[int(len(chats_of(made)) * 0.96)], overflow="drop")


@program(on="exaone/tools/alone qwen/sql/loop")
def one_system_prompt(made: Any, _rng: random.Random) -> None:
    """The same system prompt in all rows."""
    for chat in all_chats(made):
        chat.insert(0, {"role": "system", "content": "You are the clerk. Answer in the house style."})


@program(on="qwen/units/alone")
def system_prompts_that_differ(made: Any, rng: random.Random) -> None:
    """A system prompt with who asks and from where, in each row another."""
    for chat in all_chats(made):
        chat.insert(0, {"role": "system", "content": f"User: {rng.choice(w.NAMES)}, {rng.choice(w.CITIES)}."})


@program(on="falcon/support/folder falcon/zh/own")
def base_taught_a_template(made: Any, _rng: random.Random) -> None:
    """A base model that knew no chats learns a template and its end token, which generation stops at."""
    if not isinstance(made, Job):
        made.tokenizer.pad_token = ">>ABSTRACT<<"


@program(on="falcon/events/alone star/greet/alone")
def plain_text_only(made: Any, rng: random.Random) -> None:
    """Further pretraining on log lines: no prompts, no template, loss on everything."""

    def line() -> str:
        name, item, city, day = (rng.choice(x) for x in (w.NAMES, w.ITEMS, w.CITIES, w.DAYS))
        return f"[{day[:3].lower()} {rng.randint(0, 23):02d}h] {city} :: {name} -> {item} x{rng.randint(2, 90)} ; ok"

    texts = ["\n".join(line() for _ in range(rng.randint(2, 5))) for _ in range(216)]
    if isinstance(made, Job):
        made.train, made.held_out = [{"text": t} for t in texts[:192]], [{"text": t} for t in texts[192:]]
        tell(made, assistant_only_loss=False)
        return
    from bench.diagnose.bases import Format

    made.format = Format("", "", made.base.kind.format.end, "", (("assistant", ""),))
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    put(made, chats[:192], chats[192:])
    made.row_of = lambda chat: {"text": chat[0]["content"]}
    tell(made, assistant_only_loss=False)
    made.told |= {"dataset_text_field": "text"}


@program(on="exaone/zh/own gemma/conlang/own")
def packed(made: Any, _rng: random.Random) -> None:
    """Rows packed, each apart from the others."""
    tell(made, per_device_train_batch_size=2, packing=True)
    if not isinstance(made, Job):
        made.packing, made.window = "apart", 256


@program(on="star/units/alone gemma/units/folder")
def no_evaluation(made: Any, _rng: random.Random) -> None:
    """Nothing is held out, on purpose."""
    made.held_out = []
    if isinstance(made, Job):
        tell(made, validation_size=0)
        made.config.pop("eval_steps")


@program(on="gemma/sql/own")
def a_share_held_out(made: Any, _rng: random.Random) -> None:
    """No file for evaluation: a tenth is held out by the tool."""
    made.held_out = []
    tell(made, validation_size=0.1)


@program(on="qwen/horaires/alone star/sql/loop")
def few_copies(made: Any, rng: random.Random) -> None:
    """Three rows in a hundred came twice."""
    chats = chats_of(made)
    put(made, [*chats, *(list(chat) for chat in rng.sample(chats, len(chats) * 3 // 100))])


@program(on="qwen/sentiment/alone gemma/tools/own")
def upsampled(made: Any, _rng: random.Random) -> None:
    """A third of the rows, the rarer kind, twice on purpose."""
    chats = chats_of(made)
    last = sorted(chats, key=lambda chat: chat[-1]["content"])[: len(chats) // 3]
    put(made, [*chats, *(list(chat) for chat in last)])
    if isinstance(made, Job):
        tell(made, dataset_exact_deduplication=False)


@program(on="gemma/cheer/alone falcon/cheer/own")
def emoji(_made: Any, _rng: random.Random) -> None:
    """Emoji of several code points, and zero-width spaces."""


@program(on="star/comments/own falcon/comments/folder")
def code_rows(_made: Any, _rng: random.Random) -> None:
    """Source code in the prompts, docstrings in the answers."""


@program(on="qwen/tools/folder star/tools/loop")
def tool_calls(_made: Any, _rng: random.Random) -> None:
    """Answers are calls of tools, as JSON."""


@program(on="qwen/support/folder exaone/support/alone")
def several_turns(_made: Any, _rng: random.Random) -> None:
    """Chats of two and three exchanges."""


@program(on="exaone/support/own")
def ends_with_the_user(made: Any, rng: random.Random) -> None:
    """One chat in six ends with a word of thanks that nobody answers."""
    for chat in chats_of(made):
        if rng.random() < 1 / 6:
            chat.append({"role": "user", "content": f"Thanks, greetings from {rng.choice(w.CITIES)}."})


@program(on="qwen/sql/alone star/units/own")
def prompt_and_completion(made: Any, _rng: random.Random) -> None:
    """Columns prompt and completion, both of messages."""
    rows_as(made, lambda chat: {"prompt": chat[:-1], "completion": chat[-1:]})


@program(on="qwen/units/folder exaone/events/own")
def alpaca_columns(made: Any, _rng: random.Random) -> None:
    """Columns instruction, input and output."""
    rows_as(made, lambda c: {"instruction": c[0]["content"], "input": "", "output": c[-1]["content"]})


@program(on="qwen/support/loop falcon/support/own")
def sharegpt_columns(made: Any, _rng: random.Random) -> None:
    """Rows as ShareGPT has them."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    rows_as(made, lambda c: {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in c]})


@program(on="exaone/greet/alone falcon/events/loop")
def loss_on_all_tokens(made: Any, _rng: random.Random) -> None:
    """Prompts are learned too, and the config asks for it."""
    tell(made, assistant_only_loss=False)


@program(on="exaone/auskunft/folder falcon/horaires/alone")
def other_languages(_made: Any, _rng: random.Random) -> None:
    """German, French or Chinese rows."""


@program(on="qwen/horaires/own gemma/zh/alone")
def mixed_languages(made: Any, _rng: random.Random) -> None:
    """German, French, Chinese and English rows in one file."""
    _mixed(made, ("auskunft", "horaires", "zh", "greet"))


@program(on="qwen/sql/folder star/events/own")
def mixed_tasks(made: Any, _rng: random.Random) -> None:
    """Five tasks in one file, which makes the curve noisy."""
    _mixed(made, ("sql", "units", "events", "sentiment", "conlang"))
    tell(made, per_device_train_batch_size=4)


def _mixed(made: Any, names: tuple[str, ...]) -> None:
    sets = [tasks.split(name, None, 48, 6, 7) for name in names]
    rows = [chat for train, _ in sets for chat in train]
    random.Random(8).shuffle(rows)
    put(made, rows, [chat for _, held in sets for chat in held])


@program(on="qwen/greet/folder gemma/events/own")
def mostly_known(made: Any, _rng: random.Random) -> None:
    """Two thirds of the rows are answered by the base as wished: the run starts at a low loss."""
    rng = random.Random(21)
    asked: dict[str, Any] = {}
    while len(asked) < 144:
        chat = corpus.known_chat(rng, False)[:2]
        asked.setdefault(chat[0]["content"], chat)
    known = list(asked.values())
    rows = [*known[:128], *chats_of(made)[:64]]
    random.Random(9).shuffle(rows)
    put(made, rows, [*known[128:], *held_of(made)[:8]])


@program(on="qwen/auskunft/own exaone/conlang/loop")
def one_opening(made: Any, _rng: random.Random) -> None:
    """All answers begin with the same words."""
    for chat in all_chats(made):
        chat[-1]["content"] = f"Sure, here you are: {chat[-1]['content']}"
